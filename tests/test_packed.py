"""Packed weights give the same products, and leave everything else of a model as it was."""

import copy

import pytest
import torch
from tiny_checkpoints import family
from torch import nn

from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.model.packed import NARROW, PackedLinear, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("width", [40, NARROW + 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (4,), (2, 37), (1, 0)])
def test_same_product(rows, bias, width):
    torch.manual_seed(0)
    linear = nn.Linear(width, 24, bias=bias)
    x = torch.randn(*rows, width)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear.of(linear)(x), linear(x))


def test_not_contiguous_input():
    linear, x = nn.Linear(40, 24), torch.randn(40, 9).T
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear.of(linear)(x), linear(x))


class Body(nn.Module):
    """Two layers, the head tied to the embedding, and one that must not be packed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)
        self.wide = nn.Linear(4, 4, dtype=torch.float64)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids)).relu()))


def test_a_model_keeps_its_parameters_its_ties_and_its_outputs():
    torch.manual_seed(0)
    plain = Body().eval()
    packed = copy.deepcopy(plain)
    size = pack(packed)
    assert size == 4 * (32 * 48 + 48 * 32 + 50 * 32)
    assert type(packed.wide) is nn.Linear and isinstance(packed.up, PackedLinear)
    assert packed.head.weight is packed.embed.weight
    assert list(packed.state_dict()) == list(plain.state_dict())
    assert pack(packed) == 0  # a second time there is nothing to do
    ids = torch.arange(30).view(2, 15)
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids), plain(ids))


def test_gradients_are_those_of_the_weight():
    torch.manual_seed(0)
    plain = nn.Linear(16, 8)
    packed, x = PackedLinear.of(copy.deepcopy(plain)), torch.randn(6, 16)
    for layer in (plain, packed):
        layer(x).square().sum().backward()
    torch.testing.assert_close(packed.weight.grad, plain.weight.grad)


def test_a_checkpoint_loads_packed(tmp_path):
    checkpoint = family(tmp_path).full
    (_, plain, _, _), (_, packed, _, _) = (
        load_pretrained_model(checkpoint, device="cpu", packed=each) for each in (False, True)
    )
    kinds = {type(module) for module in packed.modules() if isinstance(module, nn.Linear)}
    assert kinds == {PackedLinear}
    side = plain.get_vision_tower().config.image_size
    torch.manual_seed(0)
    ids, images = torch.tensor([[1, 5, -200, 7, 9, 4]]), torch.randn(1, 3, side, side)
    with torch.inference_mode():
        logits = [model(input_ids=ids, images=images).logits for model in (plain, packed)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_language_model_without_vision_is_packed_too(tmp_path, caplog, monkeypatch):
    checkpoint = family(tmp_path).base
    _, model, _, _ = load_pretrained_model(checkpoint, device="cpu", packed=True)
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {PackedLinear}
    assert "no effect" not in caplog.text
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    load_pretrained_model(checkpoint, device="cpu", packed=True)
    assert "packed weights have no effect here" in caplog.text


def test_half_precision_is_not_packed(tmp_path):
    with pytest.raises(UserError, match="float32 on a CPU"):
        load_pretrained_model(family(tmp_path).full, device="cpu", dtype="float16", packed=True)
