"""What takes the place of CLS attention, against slow versions on transformers' own SigLIP and CLIP."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llava.model.vision_tower import VisionTower
from llava.reducers import ReducerInputError
from llava.reducers.scores import patch_scores, score_reads

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def model_of(kind: str):
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=kind == "siglip"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slow_scores(model, pixels, score: str, heads: int) -> torch.Tensor:
    """Image by image and head by head, over the states of the whole model."""
    has_cls, last, rows = model.config.model_type == "clip_vision_model", model.encoder.layers[-1], []
    for states in zip(*model(pixels, output_hidden_states=True).hidden_states, strict=True):
        if score == "probe":
            hidden, head = model.post_layernorm(states[-1]), model.head.attention
            weight, bias = head.in_proj_weight.split(32), head.in_proj_bias.split(32)
            query, key = model.head.probe[0, 0] @ weight[0].T + bias[0], hidden @ weight[1].T + bias[1]
            heads = 4
        else:
            normed = last.layer_norm1(states[-2])
            queries, key = last.self_attn.q_proj(normed), last.self_attn.k_proj(normed)
            query = queries[0] if score == "cls" else (queries[1:] if has_cls else queries).mean(0)
        width, parts = 32 // heads, []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            parts.append((key[:, own] @ query[own] / width**0.5).softmax(0))
        attention = torch.stack(parts).mean(0)
        rows.append(attention[1:] if has_cls else attention)
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("kind", "score", "default"),
    [
        ("clip", "cls", True),
        ("clip", "mean", False),
        ("siglip", "probe", True),
        ("siglip", "mean", False),
        ("headless", "mean", True),
    ],
)
def test_equals_the_slow_version(kind, score, default, heads):
    model, pixels = model_of(kind), pictures()
    expected = slow_scores(model, pixels, score, heads)
    features = VisionTower(model)(pixels, reads=score_reads(score))
    found = patch_scores(features, score, heads=heads)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    if default:  # the first there is, of all that the tower gives
        everything = VisionTower(model)(pixels, reads=score_reads(None))
        assert torch.equal(patch_scores(everything, heads=heads), found)
    one_by_one = [patch_scores(features[i : i + 1], score, heads=heads) for i in range(3)]
    assert torch.equal(torch.cat(one_by_one), found)


@pytest.mark.parametrize(("kind", "score"), [("clip", "probe"), ("siglip", "cls"), ("headless", "probe")])
def test_a_score_that_the_tower_does_not_have(kind, score):
    features = VisionTower(model_of(kind))(pictures(), reads=score_reads(None))
    with pytest.raises(ReducerInputError, match=score):
        patch_scores(features, score)


def test_a_tower_that_was_asked_for_nothing_gives_no_score():
    with pytest.raises(ReducerInputError):
        patch_scores(VisionTower(model_of("siglip"))(pictures()))
