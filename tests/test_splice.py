"""Splicing against the same thing done token by token, and the projector's shapes and names."""

import pytest
import torch
from torch import nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.projector import build_projector
from llava.model.splice import PADDING, gather, lay_out, split_padding

WIDTH = 5


def token_by_token(ids, visual, labels, embed, side, max_length):
    """The obvious version: lists, one position at a time."""
    blocks = iter(visual)
    rows = []
    for sample, sample_ids in enumerate(ids):
        row = []  # (embedding, label)
        for position, token in enumerate(sample_ids.tolist()):
            if token == IMAGE_TOKEN_INDEX:
                row += [(vector, IGNORE_INDEX) for vector in next(blocks)]
            else:
                row.append((embed.weight[token], int(labels[sample][position])))
        rows.append(row[:max_length])
    longest = max(len(row) for row in rows)
    embeds = torch.zeros(len(rows), longest, WIDTH)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), IGNORE_INDEX)
    for index, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        for offset, (vector, target) in enumerate(row):
            embeds[index, start + offset] = vector
            mask[index, start + offset] = True
            positions[index, start + offset] = offset
            targets[index, start + offset] = target
    return embeds, mask, positions, targets


def random_batch(seed: int):
    """1 to 5 samples of 1 to 12 ids with 0 to 4 images of 0 to 9 tokens, placeholders anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    ids, labels, visual = [], [], []
    for _ in range(draw(1, 6)):
        sample = torch.randint(0, 20, (draw(1, 13),), generator=generator)
        where = torch.randperm(len(sample), generator=generator)[: draw(0, 5)]
        sample[where] = IMAGE_TOKEN_INDEX
        ids.append(sample)
        labels.append(torch.randint(0, 20, sample.shape, generator=generator))
        visual += [torch.randn(draw(0, 10), WIDTH, generator=generator) for _ in where]
    return ids, labels, visual


@pytest.mark.parametrize("max_length", [None, 7, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_token_by_token(side, max_length):
    embed = nn.Embedding(20, WIDTH)
    shapes = set()
    for seed in range(60):
        ids, labels, visual = random_batch(seed)
        layout = lay_out(ids, [len(v) for v in visual], labels, padding_side=side, max_length=max_length)
        embeds, mask, positions, targets = token_by_token(ids, visual, labels, embed, side, max_length)
        with torch.no_grad():
            assert torch.equal(gather(layout, embed(layout.text_ids), visual), embeds)
        assert torch.equal(layout.attention_mask, mask)
        assert torch.equal(layout.position_ids, positions)
        assert torch.equal(layout.labels, targets)
        assert torch.equal(layout.source == PADDING, ~mask)
        assert layout.lengths == tuple(mask.sum(1).tolist())
        assert layout.padded == bool((~mask).any())
        sizes = [len(v) for v in visual]
        whole = []
        for sample in ids:
            images = int((sample == IMAGE_TOKEN_INDEX).sum())
            whole.append(len(sample) - images + sum(sizes.pop(0) for _ in range(images)))
        assert layout.truncated == sum(length > (max_length or 10**9) for length in whole)
        shapes.add((len(ids), len(visual)))
    assert len(shapes) > 20  # the draws do vary


def test_every_row_gets_its_gradient_once():
    ids = [torch.tensor([1, IMAGE_TOKEN_INDEX, 2]), torch.tensor([3])]
    text = torch.randn(3, WIDTH, requires_grad=True)
    visual = torch.randn(4, WIDTH, requires_grad=True)
    layout = lay_out(ids, [4])
    gather(layout, text, [visual]).sum().backward()
    assert torch.equal(text.grad, torch.ones_like(text)) and torch.equal(visual.grad, torch.ones_like(visual))


def test_an_empty_block_still_connects_the_graph():
    """What training without images relies on: no token, but a gradient (zero) all the same."""
    weight = torch.randn(WIDTH, requires_grad=True)
    text = torch.randn(2, WIDTH, requires_grad=True)
    block = (torch.ones(1, WIDTH) * weight)[:0]
    gather(lay_out([torch.tensor([1, 2])], []), text, [block]).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_split_padding_drops_what_the_mask_excludes():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 0, 0], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    rows = [row.tolist() for row in split_padding(ids, mask)]
    assert rows == [[5, 6], [7, 8], [1, 2, 3, 4]]
    assert [row.tolist() for row in split_padding(ids, None)] == ids.tolist()
    assert [row.tolist() for row in split_padding([ids[0], ids[1, :1]], None)] == [[0, 0, 5, 6], [7]]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_projectors(kind, names):
    projector = build_projector(kind, 6, 8)
    assert list(projector.state_dict()) == names
    assert projector(torch.zeros(3, 6)).shape == (3, 8)


def test_two_layer_projector_is_linear_gelu_linear():
    projector = build_projector("mlp2x_gelu", 6, 8)
    tokens = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    hidden = tokens @ projector[0].weight.T + projector[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))  # exact GELU
    expected = hidden @ projector[2].weight.T + projector[2].bias
    torch.testing.assert_close(projector(tokens), expected, atol=1e-6, rtol=0)


def test_identity_and_unknown_projectors():
    tokens = torch.randn(2, 6)
    assert build_projector("identity", 6, 6)(tokens) is tokens
    with pytest.raises(UserError, match=r"6.*8"):
        build_projector("identity", 6, 8)
    for kind in ("mlp", "mlp0x_gelu", "mlp2x_relu", "qformer"):
        with pytest.raises(UserError, match=f"'{kind}'"):
            build_projector(kind, 6, 8)
