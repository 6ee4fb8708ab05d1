"""The rivals against the outputs of their released code, and what ours does where that crashes or repeats."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from reducer_features import optional_fields
from safetensors import safe_open
from torch import Tensor

from llava.reducers import (
    ReducedTokens,
    ReducerInputError,
    ReducerSpecError,
    VisionFeatures,
    available_reducers,
    build_reducer,
)

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "golden" / "rivals"
GOLDEN = SHARED if SHARED.is_dir() else HERE / "data" / "rivals"
READERS = [name for name in available_reducers() if build_reducer(name).reads]


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        return case, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def features_of(case: dict, tensors: dict[str, Tensor]) -> VisionFeatures:
    batch, length = case["B"], case["N"]
    given = {name: tensor.float() for name, tensor in tensors.items() if "." not in name}
    for block in ("mid", "deep"):
        if f"attn_{block}_u" in given:  # a full map, u[h, query] v[h, key]: averaged over queries and heads
            u, v = given.pop(f"attn_{block}_u"), given.pop(f"attn_{block}_v")
            given[f"attn_{block}"] = torch.einsum("bhq,bhk->bk", u, v) / (u.shape[1] * u.shape[2])
    patches = given.pop("patches", torch.arange(batch * length * 2.0).view(batch, length, 2))
    if "key" in given:
        given["block_key"] = given.pop("key")
    rows = max(i for i in range(1, math.isqrt(length) + 1) if length % i == 0)
    return VisionFeatures(
        patches, None, patches[:, :0], case.get("heads", 1), (rows, length // rows), **given
    )


def spec_of(run: dict) -> str | None:
    """None for what a spec cannot say: MMTok's excluded patches."""
    options = {name: value for name, value in run["params"].items() if name not in ("heads", "dominant")}
    if options.pop("use_attn", True) is False:
        options["alpha"] = 0.0
    text = "".join(f", {name}={value}" for name, value in options.items())
    return None if "exclude" in options else f"{run['method']}(tokens={run['K']}{text})"


def check_visionzip(reduced: ReducedTokens, image: int, features: VisionFeatures, out: dict) -> None:
    dominant, target = out["idx"][image].tolist(), out["targets"][image].tolist()
    assert reduced.kept[image].tolist() == [-1, *dominant, *target]
    assert torch.equal(reduced.tokens[image, 0], features.cls[image, 0])
    assert torch.equal(reduced.tokens[image, 1 : 1 + len(dominant)], features.patches[image, dominant])
    first = 1 + len(dominant)
    torch.testing.assert_close(reduced.tokens[image, first:], out["merged"][image], atol=1e-5, rtol=0)
    named = {*dominant, *target}
    merged = [patch for patch in range(features.patches.shape[1]) if patch not in named]
    assert (reduced.source[image, merged] - first).tolist() == out["assign"][image].tolist()


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(GOLDEN.glob("*.safetensors")) if path.stem != "tome"],
    ids=lambda p: p.stem,
)
def test_released_outputs(path):
    case, tensors = read(path)
    features = features_of(case, tensors)
    for run in case["runs"]:
        if (spec := spec_of(run)) is None:
            continue
        reduced = build_reducer(spec)(features)
        out = {k.split(".")[1]: tensor for k, tensor in tensors.items() if k.startswith(f"{run['id']}.")}
        for image in range(case["B"]):
            alone = build_reducer(spec)(features[image : image + 1])
            kept = reduced.kept[image].tolist()
            assert alone.kept[0].tolist() == kept
            if run["method"] == "visionzip":
                check_visionzip(reduced, image, features, out)
                continue
            assert torch.equal(reduced.tokens[image], features.patches[image, kept])
            assert len(set(kept)) == run["K"]
            if "error" in run:  # the released crash: so many different patches are all there is to say
                continue
            if run["method"] == "vispruner" and not run["robust"]:
                assert set(out["order"][image, : run["K"] // 2].tolist()) <= set(kept)
            elif f"idx_single{image}" in out:  # batched, the released relevance is mixed
                assert kept == sorted(out[f"idx_single{image}"].tolist())
            else:  # -1: rows of zeros, in place of which ours has patches
                released = [patch for patch in out["idx"][image].tolist() if patch >= 0]
                assert [patch for patch in kept if patch in set(released)] == released


@pytest.mark.parametrize("path", [GOLDEN / "tome.safetensors"], ids=["tome"])
def test_released_tome(path):
    case, tensors = read(path)
    for run in case["runs"]:
        features = features_of(*read(GOLDEN / run["file"]))[:1]
        reduced = build_reducer(f"tome(tokens={run['K']})")(features)
        out = {name: tensors[f"r{run['id']}.{name}"][0] for name in ("tokens", "size", "source")}
        same = reduced.source[0] == out["source"]
        assert same.float().mean() >= 0.98  # near ties
        ours, theirs = (source.bincount(minlength=run["K"]) for source in (reduced.source[0], out["source"]))
        assert torch.equal(theirs, out["size"].long())
        if same.all():
            torch.testing.assert_close(reduced.tokens[0], out["tokens"], atol=1e-4, rtol=0)
            assert torch.equal(ours, theirs)


# --- features of our own ---


def make(batch: int = 3, grid: tuple[int, int] = (12, 12), seed: int = 0) -> VisionFeatures:
    """Random patches, and everything there is to read; questions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    length = grid[0] * grid[1]
    patches = torch.randn(batch, length, 16, generator=generator)
    return VisionFeatures(
        patches, patches[:, 0], patches, 4, grid, **optional_fields(batch, length, 16, torch.float32)
    )


@pytest.mark.parametrize("name", READERS)
def test_what_is_read_must_be_there_and_finite(name):
    reducer, features = build_reducer(name), make()
    for field in reducer.reads:
        with pytest.raises(ReducerInputError, match=field):
            reducer(dataclasses.replace(features, **{field: None}))
    others = [f for f in ("cls", "cls_attn", "block_key", "projected", "attn_mid") if f not in reducer.reads]
    without = dataclasses.replace(features, **dict.fromkeys(others))
    assert torch.equal(reducer(without).kept, reducer(features).kept)
    getattr(features, next(field for field in reducer.reads if field != "cls"))[1, ..., 7] = math.nan
    with pytest.raises(ReducerInputError, match="image 1"):
        reducer(features)


@pytest.mark.parametrize("tokens", [1, 2, 7, 50, 144, 1000])
@pytest.mark.parametrize("name", READERS)
def test_any_number_of_tokens(name, tokens):
    """As many as asked for, all different, as far as there are; also with equal rows and rows of zeros."""
    features = make()
    features.patches[1, 20:] = features.patches[1, :1]
    features.projected[1, 20:] = features.projected[1, :1]
    features.patches[2, 3:9] = 0
    features.projected[2, 3:9] = 0
    reduced = build_reducer(f"{name}(tokens={tokens})")(features)
    most = 145 if name == "visionzip" else 144  # there CLS is one of them
    assert reduced.lengths.tolist() == [min(tokens, most)] * 3
    assert reduced.tokens.isfinite().all()
    for image in range(3):
        kept = [patch for patch in reduced.kept[image].tolist() if patch >= 0]
        assert len(set(kept)) == len(kept) >= min(tokens, most) - 1
        alone = build_reducer(f"{name}(tokens={tokens})")(features[image : image + 1])
        assert torch.equal(alone.kept[0], reduced.kept[image])
        assert torch.equal(alone.source[0], reduced.source[image])


def test_one_text_for_all_images():
    features = make()
    shared = dataclasses.replace(
        features, text_embeds=features.text_embeds[1], text_tokens=features.text_tokens[1]
    )
    for name in ("cdpruner", "mmtok"):
        one = build_reducer(name)(features[1:2])
        assert torch.equal(build_reducer(name)(shared).kept[1], one.kept[0])
    assert [len(text) for text in shared[1:].float().text_tokens] == [5, 5]


def test_holov_with_its_variances():
    """The released score, cosines and all, gives the quotas that ours takes from the attention alone."""
    features = make(seed=3)
    kept = build_reducer("holov(tokens=40)")(features).kept
    for image in range(3):
        attention = features.cls_attn[image].double().mean(0) * 1000
        scores = []
        for chunk in range(16):
            part = slice(9 * chunk, 9 * chunk + 9)
            rows = features.projected[image, part].double()
            unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-6)
            similarity = (unit @ unit.T).fill_diagonal_(0)
            mean = similarity.sum(1, keepdim=True) / 8
            variance = (similarity - mean).square().sum(1) / 8
            own = attention[part]
            scores.append((own + 0.09 * variance * own.mean() / (variance.mean() + 1e-6)).mean())
        share = torch.stack(scores) / (sum(scores) + 1e-6)
        quota = (share * 40).floor().long()
        quota[share.argsort(descending=True)[: 40 - int(quota.sum())]] += 1
        if (quota <= 9).all():
            assert (kept[image] // 9).bincount(minlength=16).tolist() == quota.tolist()


def test_evit_sums_up_what_it_drops():
    features = make()
    reduced = build_reducer("evit(tokens=9)")(features)
    for image in range(3):
        attention = features.cls_attn[image].double().mean(0)
        best = attention.topk(8).indices.sort().values
        rest = [patch for patch in range(144) if patch not in best.tolist()]
        assert reduced.kept[image].tolist() == [*best.tolist(), -1]
        expected = attention[rest] @ features.patches[image, rest].double()
        torch.testing.assert_close(reduced.tokens[image, -1].double(), expected, atol=1e-6, rtol=1e-5)
        assert (reduced.source[image, rest] == 8).all()


def test_hiprune_takes_anchors_first():
    features = make(1)
    kept = set(build_reducer("hiprune(tokens=10, alpha=1)")(features).kept[0].tolist())
    assert set(features.attn_mid[0, 1:].topk(2).indices.tolist()) <= kept


def test_options_that_make_no_sense():
    for spec in ("visionzip(tokens=10, contextual=10)", "scope(combined=max)", "vispruner(ratio=1.5)"):
        with pytest.raises(ReducerSpecError, match=spec.split("(")[0]):
            build_reducer(spec)
