"""AnyRes budgets and the joining of tiles, against slow obvious versions."""

import math
from fractions import Fraction

import pytest
import torch
from PIL import Image
from test_llava_llama import GREEDY, IMAGE, make_model, pictures
from transformers import CLIPImageProcessorPil

from llava.errors import UserError
from llava.mm_utils import process_images, unpad_image
from llava.model.anyres import share_out
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.reducers import build_reducer

PINPOINTS = [[84, 168], [168, 84], [168, 168]]
WIDE = (200, 120)
"""A picture in 2 x 2 tiles, with padding above and below."""


def make_anyres(reducer: str = "none", budget: str = "tile", merge: str = "spatial_unpad", **more):
    return make_model(
        reducer,
        mm_patch_merge_type=merge,
        mm_anyres_budget=budget,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS,
        **more,
    )


def views(seed: int = 0) -> torch.Tensor:
    """The small copy of a picture and 2 x 2 tiles, the last of them nearly blank."""
    crops = pictures(5, seed)
    crops[4] *= 0.01
    return crops


def slow_join(model: LlavaLlamaForCausalLM, crops: torch.Tensor, kept: list[list[int]], unpad: bool):
    """The embeddings of kept patches [view][i], walking over the picture place by place."""
    tower, newline = model.get_vision_tower(), model.model.image_newline
    embeds = model.project(list(tower.tokens(crops)))
    out = [embeds[0][patch] for patch in kept[0]]
    inside = torch.ones(12, 12, dtype=torch.bool)
    if unpad:
        inside[:] = False
        top = unpad_image(torch.arange(12).view(1, 12, 1).expand(1, 12, 12), WIDE)[0, :, 0]
        inside[top] = True
    for row in range(12):
        found = []
        for column in range(12):
            tile, patch = row // 6 * 2 + column // 6, row % 6 * 6 + column % 6
            if patch in kept[1 + tile] and inside[row, column]:
                found.append(embeds[1 + tile][patch])
        out += found
        if found and newline is not None:
            out.append(newline)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("total", "masses", "most", "expected"),
    [
        (10, [1, 1, 1, 1, 1], 36, [2, 2, 2, 2, 2]),
        (12, [1, 1, 1, 1, 1], 36, [3, 3, 2, 2, 2]),
        (10, [6, 3, 1], 36, [5, 3, 2]),  # 1 + 7 x (0.6, 0.3, 0.1) = 5.2, 3.1, 1.7
        (3, [8, 1, 1, 1], 36, [1, 1, 1, 1]),
        (20, [98, 1, 1], 10, [10, 5, 5]),  # what the first cannot take goes to the others
        (99, [5, 1], 10, [10, 10]),
    ],
)
def test_shares_by_hand(total, masses, most, expected):
    assert share_out(total, masses, most) == expected


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_within_one_of_the_proportion_and_sum_to_the_total(seed):
    generator = torch.Generator().manual_seed(seed)
    masses = (torch.rand(5, generator=generator) + 0.01).tolist()
    total = int(torch.randint(5, 400, (), generator=generator))
    counts = share_out(total, masses, most=576)
    assert sum(counts) == total
    whole = sum(Fraction(mass) for mass in masses)
    for count, mass in zip(counts, masses, strict=True):
        assert abs(count - (1 + (total - 5) * Fraction(mass) / whole)) < 1
    tight = share_out(total, masses, most=total // 4 + 1)
    assert sum(tight) == total and max(tight) <= total // 4 + 1 and min(tight) >= 1


@pytest.mark.parametrize(
    "reducer", ["none", "topk(tokens=9)", "grid(tokens=9)", "random(tokens=9)", "sequential(tokens=9)"]
)
@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_whole_patches_stand_in_the_rows_of_the_picture(reducer, merge):
    model = make_anyres(reducer, merge=merge)
    crops = views()
    kept = build_reducer(reducer)(model.get_vision_tower()(crops)).kept.tolist()
    (found,) = model.embed_images([crops], [WIDE])
    expected = slow_join(model, crops, kept, unpad=merge == "spatial_unpad")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_all_patches_by_a_reducer_are_none_bit_for_bit():
    crops = [views(), views(1)]
    everything = make_anyres("none").embed_images(crops, [WIDE, WIDE[::-1]])
    for budget, tokens in (("tile", 36), ("shared", 180)):
        found = make_anyres(f"topk(tokens={tokens})", budget).embed_images(crops, [WIDE, WIDE[::-1]])
        assert all(torch.equal(one, other) for one, other in zip(found, everything, strict=True))


@pytest.mark.parametrize("reducer", ["topk(tokens=40)", "prumerge+(tokens=40)"])
def test_shared_gives_the_total_by_the_largest_attentions(reducer):
    model = make_anyres(reducer, "shared", merge="flat")
    crops = views()
    features = model.get_vision_tower()(crops)
    masses = []
    for view in range(5):
        attention = torch.zeros(36)
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            logits = [
                float(features.query[view, part] @ key[part]) / math.sqrt(8) for key in features.key[view]
            ]
            attention += torch.tensor(logits).softmax(0)[1:] / 4
        masses.append(sum(sorted(attention.tolist(), reverse=True)[: 40 // 5]))
    counts = share_out(40, masses, 36)
    assert sum(counts) == 40 and len(set(counts)) > 1
    expected = []
    for view, count in enumerate(counts):
        one = build_reducer(reducer.replace("40", str(count)))(features[view : view + 1])
        expected += model.project([one.tokens[0]])
    (found,) = model.embed_images([crops], [WIDE])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", ["tile", "shared", "papers"])
def test_a_batch_of_pictures_equals_one_by_one(budget):
    model = make_anyres("topk(tokens=40)", budget)
    crops, sizes = [views(), views(1)[:3], views(2)], [WIDE, (200, 100), WIDE[::-1]]
    if budget == "papers":
        crops[1] = views(1)
    together = model.embed_images(crops, sizes)
    for one, crop, size in zip(together, crops, sizes, strict=True):
        torch.testing.assert_close(one, model.embed_images([crop], [size])[0], atol=1e-5, rtol=0)


def test_papers_resizes_to_two_by_two_tiles_and_gives_each_view_a_fifth():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    picture = Image.radial_gradient("L").resize((300, 100)).convert("RGB")
    model = make_anyres("topk(tokens=40)", "papers")
    pixels = process_images([picture], processor, model.config)
    square = picture.resize((168, 168))
    corners = [square.crop((x, y, x + 84, y + 84)) for y in (0, 84) for x in (0, 84)]
    expected = [processor(view, return_tensors="pt")["pixel_values"] for view in (square, *corners)]
    torch.testing.assert_close(pixels[0, 1:], torch.cat(expected[1:]))
    torch.testing.assert_close(pixels[0, :1], expected[0], atol=0.05, rtol=0)
    kept = build_reducer("topk(tokens=8)")(model.get_vision_tower()(pixels[0])).kept.tolist()
    (found,) = model.embed_images(pixels, [picture.size])
    torch.testing.assert_close(found, slow_join(model, pixels[0], kept, unpad=False), atol=1e-5, rtol=0)
    (everything,) = make_anyres("none", "papers").embed_images(pixels, [picture.size])
    assert len(everything) == 5 * 36 + 12  # an end for each row of the picture


def test_generate_takes_the_budget_from_the_config():
    prompt = torch.tensor([[1, 5, IMAGE, 7, 8]])
    crops = views()
    model = make_anyres("prumerge+(tokens=10)", "shared")
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.append(kwargs["inputs_embeds"].shape[1]) if kwargs.get("inputs_embeds") is not None else None
        ),
        with_kwargs=True,
    )
    found = model.generate(prompt, images=[crops], image_sizes=[WIDE], **GREEDY)
    assert seen == [4 + 10 + 5]  # text, the total, what PruMerge appends in each view
    embeds = model.embed_images([crops], [WIDE])
    assert torch.equal(found, model.generate(prompt, visual_embeds=embeds, **GREEDY))


def test_shared_needs_a_fixed_number():
    with pytest.raises(UserError, match=r"prumerge\+"):
        make_anyres("prumerge+", "shared")
    model = make_anyres("none", "shared")
    with pytest.raises(UserError, match="prumerge"):
        model.set_reducer("prumerge(ratio=0.5)")
    assert model.reducer.name == "none"


def test_merged_tokens_are_joined_flat():
    model = make_anyres("prumerge+")
    separate = torch.cat(model.project(model.encode_images(views())))
    (found,) = model.embed_images(views()[None], [WIDE])
    torch.testing.assert_close(found, separate, atol=1e-5, rtol=0)


def test_tiles_in_rows_need_the_size_of_the_picture():
    with pytest.raises(UserError, match="image_sizes"):
        make_anyres().generate(torch.tensor([[1, IMAGE]]), images=[views()], **GREEDY)
