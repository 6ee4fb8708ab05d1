"""Reducers against the released code's outputs, a slow obvious version, and the contract all of them keep."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from reducer_features import optional_fields
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava.reducers import (
    ReducedTokens,
    ReducerInputError,
    VisionFeatures,
    available_reducers,
    build_reducer,
)
from llava.reducers.baselines import grid_shape
from llava.reducers.scores import patch_scores

HERE = Path(__file__).parent
SPECS = [
    "none",
    "random(tokens=20, seed=3)",
    "sequential(tokens=20)",
    "grid(tokens=20)",
    "topk(tokens=20)",
    "pool(tokens=20)",
    "prumerge",
    "prumerge(ratio=0.125)",
    "prumerge(tokens=20)",
    "prumerge(min_tokens=4, max_tokens=20)",
    "prumerge(merge=false)",
    "prumerge+",
    "prumerge+(ratio=0.125)",
    "prumerge+(ratio=0.3)",
    "prumerge+(tokens=20)",
    "prumerge+(min_tokens=8, max_tokens=24)",
    "prumerge+(merge=false)",
    "cdpruner(tokens=20)",
    "divprune(tokens=20)",
    "evit(tokens=20)",
    "hiprune(tokens=20, alpha=0.5)",
    "holov(tokens=20)",
    "mmtok(tokens=20)",
    "scope(tokens=20)",
    "tome(tokens=20)",
    "visionzip(tokens=20)",
    "vispruner(tokens=20)",
]
READS_CLS = [spec for spec in SPECS if spec.startswith(("prumerge", "topk"))]


def make_features(
    batch: int = 3,
    grid: tuple[int, int] = (24, 24),
    width: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharp: float = 1.0,
) -> VisionFeatures:
    """Random features; image i's attention is the more peaked the larger i, so that counts differ."""
    generator = torch.Generator().manual_seed(seed)
    length = grid[0] * grid[1]
    patches = torch.randn(batch, length, width, generator=generator)
    key = torch.randn(batch, length + 1, width, generator=generator)
    query = torch.randn(batch, width, generator=generator) * sharp
    query = query * torch.linspace(0.4, 1.6, max(batch, 2))[:batch, None]
    features = VisionFeatures(patches.to(dtype), query.to(dtype), key.to(dtype), 4, grid)
    return dataclasses.replace(features, **optional_fields(batch, length, width, dtype))


# --- a slow obvious version: one image, one token at a time, in float64 ---


def slow_attention(features: VisionFeatures, image: int) -> Tensor:
    query, key = features.query[image].double(), features.key[image].double()
    return (key @ query / math.sqrt(len(query))).softmax(0)[1:]


def slow_outliers(attention: Tensor) -> int:
    q1, q3 = torch.quantile(attention, 0.25), torch.quantile(attention, 0.75)
    return int((attention > q3 + 1.5 * (q3 - q1)).sum())


def slow_prumerge(features: VisionFeatures, image: int, plus: bool, ratio: float | None) -> tuple:
    """Kept patches, tokens (the appended one last) and where each patch went, of one image."""
    attention = slow_attention(features, image)
    patches, key = features.patches[image].double(), features.key[image, 1:].double()
    length = len(patches)
    count = slow_outliers(attention) if ratio is None else int(length * ratio)
    kept = attention.argsort(descending=True, stable=True)[:count].tolist()
    if plus and ratio is None:
        teeth = range(0, length - 1, max(1, int(int(1 / (count / length)) / 3))) if count else []
    elif plus:
        step = int(1 / ratio)
        teeth = range(step // 2, length - 1, step)
    else:
        teeth = []
    kept += [tooth for tooth in teeth if tooth not in kept]

    unit = torch.nn.functional.normalize(key, dim=1)
    tokens = []
    for patch in kept:
        order = (unit @ unit[patch]).argsort(descending=True, stable=True).tolist()
        near = [i for i in order if i != patch][:32]
        tokens.append(patches[patch] + attention[near] @ patches[near])
    pruned = [i for i in range(length) if i not in kept]
    tokens.append(attention[pruned] @ patches[pruned])
    source = [
        kept.index(i) if i in kept else int((unit[kept] @ unit[i]).argmax()) if kept else 0
        for i in range(length)
    ]
    return kept, torch.stack(tokens), source


def assert_like_slow(reduced: ReducedTokens, image: int, slow: tuple, atol: float = 1e-5) -> None:
    kept, tokens, source = slow
    count = len(kept)
    assert int(reduced.lengths[image]) == count + 1
    assert reduced.kept[image, :count].tolist() == kept
    torch.testing.assert_close(reduced.tokens[image, : count + 1].double(), tokens, atol=atol, rtol=0)
    assert reduced.source[image].tolist() == source


# --- the released code's outputs ---


def golden_files() -> list[Path]:
    """All of ../shared/golden/reducers where it is there, else the copies kept with the tests."""
    shared = HERE.parent.parent / "shared" / "golden" / "reducers"
    folder = shared if shared.is_dir() else HERE / "data" / "reducers"
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("e2e")]


def read_golden(path: Path) -> tuple[dict, dict[str, Tensor], VisionFeatures]:
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    exact = {name: tensors[name].float() * scale for name, scale in case["scales"].items()}
    rows = max(i for i in range(1, math.isqrt(case["N"]) + 1) if case["N"] % i == 0)
    features = VisionFeatures(
        exact["features"], exact["query"][:, 0], exact["key"], 1, (rows, case["N"] // rows)
    )
    return case, tensors, features


def run_spec(run: dict) -> str:
    name = {"prumerge": "prumerge", "prumerge_plus": "prumerge+"}[run["variant"]]
    return name if run["adaptive"] else f"{name}(ratio={run['reduction_ratio_arg']})"


@pytest.mark.parametrize(
    "path", [path for path in golden_files() if not path.stem.startswith("half")], ids=lambda path: path.stem
)
def test_released_outputs(path):
    case, tensors, features = read_golden(path)
    torch.testing.assert_close(
        patch_scores(features), tensors["cls_attn"], atol=1e-6, rtol=0, check_stride=False
    )
    for run in case["runs"]:
        reduced = build_reducer(run_spec(run))(features)
        plus, ratio = (
            run["variant"] == "prumerge_plus",
            None if run["adaptive"] else run["reduction_ratio_arg"],
        )
        for image in range(case["B"]):
            slow = slow_prumerge(features, image, plus, ratio)
            assert_like_slow(reduced, image, slow, atol=2e-5)  # covers what the released code cannot run
            if "error" in run or (run["adaptive"] and case["B"] > 1):
                continue
            index, tokens = tensors[f"{run['id']}.idx"][image].tolist(), tensors[f"{run['id']}.tokens"][image]
            if run["n_topk"] == 0 < run.get("outlier_count", 0):
                assert slow[0] and not index  # the released float product lost the one outlier
                continue
            count = int(reduced.lengths[image]) - 1
            unique = list(dict.fromkeys(index))  # fixed plus keeps a patch twice where comb and outliers meet
            assert reduced.kept[image, :count].tolist() == unique
            if len(unique) == len(index):  # duplicates are also merged twice, and lose pruned patches
                torch.testing.assert_close(reduced.tokens[image, : count + 1], tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "path", [path for path in golden_files() if path.stem.startswith("half")], ids=lambda path: path.stem
)
def test_released_half_precision(path):
    """Ties and rounding reorder there: compared as sets, and token by token where both keep one."""
    case, tensors, features = read_golden(path)
    dtype = getattr(torch, case["compute_dtype"])
    features = VisionFeatures(
        features.patches.to(dtype), features.query.to(dtype), features.key.to(dtype), 1, features.grid
    )
    for run in case["runs"]:
        reduced = build_reducer(run_spec(run))(features)
        assert reduced.tokens.dtype == dtype
        index, tokens = tensors[f"{run['id']}.idx"][0].tolist(), tensors[f"{run['id']}.tokens"][0].float()
        kept = reduced.kept[0, : int(reduced.lengths[0]) - 1].tolist()
        top = run["n_topk"]
        ours, theirs = set(kept[:top]), set(index[:top])
        assert len(ours & theirs) >= 0.9 * len(theirs)
        for patch in ours & theirs:
            torch.testing.assert_close(
                reduced.tokens[0, kept.index(patch)].float(), tokens[index.index(patch)], atol=0.1, rtol=0
            )


def test_golden_batch_differs_from_the_pooled_count(golden):
    """At B = 3 the released budget is pooled; ours is what each image gets alone."""
    case, _, features = read_golden(golden / "reducers" / "adaptive_b3.safetensors")
    pooled = {run["n_kept"] for run in case["runs"] if "n_kept" in run}
    counts = (build_reducer("prumerge")(features).lengths - 1).tolist()
    alone = [int(build_reducer("prumerge")(features[i : i + 1]).lengths) - 1 for i in range(case["B"])]
    assert counts == alone == [slow_outliers(slow_attention(features, i)) for i in range(case["B"])]
    assert len(set(counts)) > 1 and set(counts).isdisjoint(pooled)


@pytest.mark.parametrize("grid", [(24, 24), (16, 16), (7, 9), (4, 8), (1, 33), (2, 3), (1, 1)])
@pytest.mark.parametrize(
    ("plus", "ratio"), [(False, None), (True, None), (False, 0.125), (True, 0.125), (True, 0.3)]
)
def test_like_the_slow_version(grid, plus, ratio):
    features = make_features(3, grid, width=16, seed=grid[0], sharp=2.0)
    spec = "prumerge+" if plus else "prumerge"
    reduced = build_reducer(spec if ratio is None else f"{spec}(ratio={ratio})")(features)
    for image in range(3):
        assert_like_slow(reduced, image, slow_prumerge(features, image, plus, ratio))


# --- what every reducer keeps ---


def check_contract(spec: str, features: VisionFeatures) -> ReducedTokens:
    reduced = build_reducer(spec)(features)
    batch, length, width = features.patches.shape
    longest = reduced.tokens.shape[1]
    assert reduced.tokens.dtype == features.patches.dtype
    assert reduced.tokens.shape == (batch, longest, width)
    assert reduced.lengths.shape == (batch,) and reduced.lengths.dtype == torch.int64
    assert reduced.kept.shape == (batch, longest) and reduced.kept.dtype == torch.int64
    assert reduced.source.shape == (batch, length) and reduced.source.dtype == torch.int64
    assert reduced.tokens.isfinite().all()
    assert int(reduced.lengths.max()) == longest and int(reduced.lengths.min()) >= 1
    parts = reduced.unbind()
    for image in range(batch):
        count = int(reduced.lengths[image])
        assert torch.equal(parts[image], reduced.tokens[image, :count])
        assert not reduced.tokens[image, count:].any()
        assert (reduced.kept[image, count:] == -1).all()
        kept = {row: patch for row, patch in enumerate(reduced.kept[image].tolist()) if patch >= 0}
        assert len(set(kept.values())) == len(kept) and all(patch < length for patch in kept.values())
        source = reduced.source[image]
        assert int(source.min()) >= -1 and int(source.max()) < count
        for row, patch in kept.items():
            assert int(source[patch]) == row
    return reduced


def test_every_method_is_tested():
    assert {build_reducer(spec).name for spec in SPECS} == set(available_reducers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_contract(spec, dtype):
    for grid in [(24, 24), (5, 7), (4, 8), (3, 2), (1, 1)]:
        check_contract(spec, make_features(3, grid, dtype=dtype, sharp=2.0))


@pytest.mark.parametrize("spec", SPECS)
def test_contract_flat_attention(spec):
    """A zero query, and keys all alike: no outlier, every score a tie."""
    features = make_features(2)
    for flat in [
        dataclasses.replace(features, query=torch.zeros_like(features.query)),
        dataclasses.replace(features, key=torch.ones_like(features.key)),
        dataclasses.replace(features, key=torch.zeros_like(features.key)),
        dataclasses.replace(features, patches=torch.zeros_like(features.patches)),
    ]:
        reduced = check_contract(spec, flat)
        if spec in ("prumerge", "prumerge+") and flat.patches.any():
            assert reduced.lengths.tolist() == [1, 1]
            attention = torch.stack([slow_attention(flat, image) for image in range(2)])
            expected = (attention.unsqueeze(1) @ flat.patches.double()).float()
            torch.testing.assert_close(reduced.tokens, expected)
            assert not reduced.source.any()  # everything went to the one token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "near ties"])
@pytest.mark.parametrize("spec", SPECS)
def test_batch_equals_one_by_one(spec, kind, dtype):
    """The choice of tokens bit for bit, at every batch size; the tokens to rounding."""
    reducer = build_reducer(spec)
    for batch in range(1, 10) if dtype == torch.float32 else (2, 7):
        features = make_features(batch, (24, 24), width=48, seed=batch, dtype=dtype, sharp=1.5)
        if kind == "near ties":  # few different keys, and most of those a last bit apart
            few = features.key[:, torch.arange(577) % 40]
            nudge = torch.where(torch.arange(577) % 3 == 0, 1 + torch.finfo(dtype).eps, 1).to(dtype)
            features = dataclasses.replace(features, key=few * nudge[None, :, None])
        together = reducer(features)
        for image in range(batch):
            alone = reducer(features[image : image + 1])
            count = int(alone.lengths)
            assert int(together.lengths[image]) == count
            assert torch.equal(together.kept[image, :count], alone.kept[0])
            if kind == "random":
                torch.testing.assert_close(
                    together.tokens[image, :count].float(), alone.tokens[0].float(), atol=1e-5, rtol=1e-2
                )


def test_a_batch_changes_nobody():
    """An all-zero placeholder image among real ones affects none of them."""
    features = make_features(4, sharp=2.0)
    for tensor in (features.patches, features.query, features.key):
        tensor[2] = 0
    for spec in SPECS:
        reduced = build_reducer(spec)(features)
        for image in (0, 1, 3):
            alone = build_reducer(spec)(features[image : image + 1])
            count = int(alone.lengths)
            assert torch.equal(reduced.kept[image, :count], alone.kept[0])
            torch.testing.assert_close(reduced.tokens[image, :count], alone.tokens[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["patches", "query", "key"])
@pytest.mark.parametrize("spec", [spec for spec in READS_CLS if not spec.startswith("topk")])
def test_not_finite_is_refused(spec, where, value):
    features = make_features(3)
    getattr(features, where)[1].view(-1)[7] = value
    with pytest.raises(ReducerInputError, match="image 1"):
        build_reducer(spec)(features)


def test_topk_refuses_nan_scores():
    features = make_features(3)
    features.query[2, 0] = math.nan
    with pytest.raises(ReducerInputError, match="image 2"):
        build_reducer("topk(tokens=4)")(features)


@pytest.mark.parametrize("spec", SPECS)
def test_tower_without_cls(spec):
    features = make_features(2, sharp=2.0)
    features = dataclasses.replace(features, query=None, key=features.key[:, 1:])
    if spec in READS_CLS:
        with pytest.raises(ReducerInputError, match="CLS"):
            build_reducer(spec)(features)
    else:
        check_contract(spec, features)


def test_empty_batch():
    features = make_features(3)[:0]
    for spec in SPECS:
        assert build_reducer(spec)(features).unbind() == []


def test_large_half_precision_scores_do_not_overflow():
    """q . k above float16's 65504 is no infinity: scores are taken in float32."""
    features = make_features(2, dtype=torch.float16)
    loud = dataclasses.replace(features, query=features.query * 200, key=features.key * 200)
    assert (loud.key[:, 1:] @ loud.query.unsqueeze(2)).isinf().any()
    for spec in READS_CLS:
        check_contract(spec, loud)


def test_autocast_changes_nothing():
    features = make_features(2, sharp=2.0)
    for spec in SPECS:
        plain = build_reducer(spec)(features)
        with torch.autocast("cpu", torch.bfloat16):
            inside = build_reducer(spec)(features)
        assert torch.equal(plain.tokens, inside.tokens) and torch.equal(plain.kept, inside.kept)


# --- gradients, memory, synchronisation ---


@pytest.mark.parametrize("plus", [False, True])
def test_gradients_like_the_slow_version(plus):
    features = make_features(2, (8, 8), width=16, sharp=3.0)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for fast in (True, False):
        patches = features.patches.clone().requires_grad_()
        own = dataclasses.replace(features, patches=patches)
        if fast:
            total = (build_reducer("prumerge+" if plus else "prumerge")(own).tokens @ direction).sum()
        else:
            total = sum((slow_prumerge(own, i, plus, None)[1] @ direction.double()).sum() for i in range(2))
        total.backward()
        gradients.append(patches.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_flow(spec, dtype):
    features = make_features(2, (8, 8), dtype=dtype, sharp=2.0)
    features.patches.requires_grad_()
    build_reducer(spec)(features).tokens.float().sum().backward()
    assert features.patches.grad.isfinite().all() and features.patches.grad.any()


def test_strided_features():
    """Features need not lie in one piece."""
    features = make_features(2, sharp=2.0)
    wide = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (features.patches, features.key)]
    apart = dataclasses.replace(features, patches=wide[0], key=wide[1])
    assert not wide[0].is_contiguous()
    for spec in ("prumerge", "prumerge+"):
        whole, other = build_reducer(spec)(features), build_reducer(spec)(apart)
        assert torch.equal(whole.kept, other.kept)
        torch.testing.assert_close(whole.tokens, other.tokens)


class Spy(TorchDispatchMode):
    """Counts operations that wait for the device, and the elements of the largest tensor made."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in self.WAITS:
            self.waits.append(name)
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith(("scope", "mmtok"))])
def test_one_host_sync_a_batch(spec, monkeypatch):
    """But for the two whose greedy search asks at every choice."""
    features = make_features(4, sharp=2.0)
    lists = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(0) or tolist(tensor))
    with Spy() as spy:
        build_reducer(spec)(features)
    assert not spy.waits and len(lists) <= 1


@pytest.mark.parametrize("spec", ["prumerge(tokens=144)", "prumerge+(tokens=144)", "topk"])
def test_extra_memory_is_bounded(spec):
    """No tensor is larger than the keys or the similarities of the kept patches (in blocks of 16 rows)."""
    features = make_features(4, width=64)
    with Spy() as spy:
        build_reducer(spec)(features)
    assert spy.largest <= 4 * 576 * (144 + 16)


# --- budgets ---


def flat_to_peaked() -> VisionFeatures:
    """Six images with few to very many outliers."""
    features = make_features(6, width=64)
    features.query.mul_(torch.tensor([0.1, 0.3, 0.3, 0.5, 1.0, 2.0])[:, None])
    return features


def test_clamps_and_counts():
    features = flat_to_peaked()
    free = (build_reducer("prumerge")(features).lengths - 1).tolist()
    assert min(free) < 10 < 30 < max(free), free
    clamped = build_reducer("prumerge(min_tokens=10, max_tokens=30)")(features)
    assert (clamped.lengths - 1).tolist() == [min(max(count, 10), 30) for count in free]
    for image in range(6):  # always the first by attention
        count = int(clamped.lengths[image]) - 1
        order = slow_attention(features, image).argsort(descending=True)
        assert clamped.kept[image, :count].tolist() == order[:count].tolist()
    for tokens in (1, 2, 17, 72, 144, 500, 576, 1000):
        for name in ("prumerge", "prumerge+"):
            lengths = build_reducer(f"{name}(tokens={tokens})")(features).lengths
            assert (lengths - 1).tolist() == [min(tokens, 576)] * 6


def test_clamped_plus():
    features = flat_to_peaked()
    free = build_reducer("prumerge+")(features)
    counts = (free.lengths - 1).tolist()
    assert min(counts) < 60 and max(counts) > 144, counts
    clamped = build_reducer("prumerge+(min_tokens=60, max_tokens=144)")(features)
    assert (clamped.lengths - 1).tolist() == [min(max(count, 60), 144) for count in counts]
    for image, count in enumerate(counts):
        kept = clamped.kept[image][clamped.kept[image] >= 0].tolist()
        attention = slow_attention(features, image)
        outliers = slow_outliers(attention)
        ranks = attention.argsort(descending=True).argsort()
        if count < 60:  # all it kept anyway, and more by attention
            assert set(free.kept[image][free.kept[image] >= 0].tolist()) <= set(kept)
        elif count > 144:
            by_attention = min(outliers, 72)
            assert ranks[kept[:by_attention]].tolist() == list(range(by_attention))
            samples = kept[by_attention:]
            assert samples == sorted(samples)
            gaps = torch.tensor(samples).diff()
            assert samples[0] < 24 and samples[-1] > 552 and int(gaps.max()) <= 24  # over the whole image
        else:
            assert kept == free.kept[image][free.kept[image] >= 0].tolist()


def test_plus_with_tokens_is_half_attention_half_comb():
    features = make_features(2, sharp=2.0)
    reduced = build_reducer("prumerge+(tokens=144)")(features)
    for image in range(2):
        kept = reduced.kept[image, :144].tolist()
        order = slow_attention(features, image).argsort(descending=True).tolist()
        comb = set(range(4, 575, 8))  # the released training comb at 1/8
        assert comb <= set(kept)
        by_attention = [patch for patch in kept if patch not in comb]
        assert by_attention == [patch for patch in order if patch not in comb][:72]


@pytest.mark.parametrize("options", ["", "ratio=0.125", "tokens=20", "min_tokens=4, max_tokens=20"])
@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_without_merging_the_selection_is_the_same_and_its_patches_are_untouched(name, options):
    features = make_features(3, sharp=2.0)
    merged = build_reducer(f"{name}({options})")(features)
    selected = build_reducer(f"{name}({options}{', ' if options else ''}merge=false)")(features)
    assert selected.lengths.tolist() == (merged.lengths - 1).tolist()
    for image, count in enumerate(selected.lengths.tolist()):
        kept = selected.kept[image, :count]
        assert torch.equal(kept, merged.kept[image, :count])
        assert torch.equal(selected.tokens[image, :count], features.patches[image, kept])
        assert int((selected.source[image] >= 0).sum()) == count  # the others went nowhere


# --- baselines ---


def test_random_is_the_seed_alone():
    one, two = make_features(3, seed=1), make_features(2, seed=2)
    places = {}
    for seed in range(5):
        reducer = build_reducer(f"random(tokens=30, seed={seed})")
        rows = torch.cat([reducer(one).kept, reducer(two).kept])
        assert (rows == rows[0]).all() and (rows[0].diff() > 0).all()
        places[tuple(rows[0].tolist())] = seed
    assert len(places) == 5


def test_sequential_is_the_top_of_the_image():
    features = make_features(2)
    reduced = build_reducer("sequential(tokens=40)")(features)
    assert torch.equal(reduced.tokens, features.patches[:, :40])
    assert torch.equal(reduced.kept, torch.arange(40).repeat(2, 1))


def test_grid_is_two_dimensional():
    features = make_features(1)
    kept = build_reducer("grid(tokens=64)")(features).kept[0]
    rows, columns = kept // 24, kept % 24
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [1, 4, 7, 10, 13, 16, 19, 22]
    assert len(kept) == 64
    taken = features.patches[0, kept]
    assert torch.equal(build_reducer("grid(tokens=64)")(features).tokens[0], taken)


@pytest.mark.parametrize(
    ("tokens", "grid", "shape"),
    [
        (64, (24, 24), (8, 8)),
        (144, (24, 24), (12, 12)),
        (38, (24, 24), (6, 6)),
        (576, (24, 24), (24, 24)),
        (9999, (24, 24), (24, 24)),
        (1, (24, 24), (1, 1)),
        (8, (1, 40), (1, 8)),
        (18, (10, 20), (3, 6)),
    ],
)
def test_grid_shape(tokens, grid, shape):
    assert grid_shape(tokens, *grid) == shape


def test_topk_is_head_mean_attention_in_raster_order():
    features = make_features(2, width=32)  # 4 heads of 8
    reduced = build_reducer("topk(tokens=25)")(features)
    for image in range(2):
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            logits = (
                features.key[image, :, part].double() @ features.query[image, part].double() / math.sqrt(8)
            )
            heads.append(logits.softmax(0)[1:])
        best = torch.stack(heads).mean(0).topk(25).indices.sort().values
        assert reduced.kept[image].tolist() == best.tolist()
        assert torch.equal(reduced.tokens[image], features.patches[image, best])
    assert (reduced.source >= 0).sum().item() == 50  # the others went nowhere


def test_pool_is_average_pooling():
    features = make_features(2, (12, 24), width=8)
    reduced = build_reducer("pool(tokens=32)")(features)
    pictures = features.patches.transpose(1, 2).unflatten(2, (12, 24))
    expected = torch.nn.functional.avg_pool2d(pictures, (3, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reduced.tokens, expected)
    rows, columns = torch.arange(12) // 3, torch.arange(24) // 3
    assert torch.equal(reduced.source[0], (rows[:, None] * 8 + columns).flatten())


def test_pool_cells_that_do_not_divide():
    features = make_features(1, (7, 9), width=4)
    reduced = build_reducer("pool(tokens=12)")(features)
    for cell in range(int(reduced.lengths)):
        members = features.patches[0][reduced.source[0] == cell]
        assert len(members) >= 1
        torch.testing.assert_close(reduced.tokens[0, cell], members.mean(0))


def test_none_is_everything():
    features = make_features(2)
    reduced = build_reducer("none")(features)
    assert torch.equal(reduced.tokens, features.patches)
    assert reduced.kept[1].tolist() == reduced.source[1].tolist() == list(range(576))
