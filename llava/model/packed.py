"""Faster products on a CPU: weights laid out once the way oneDNN multiplies them.

torch's float32 `F.linear` hands the weight to BLAS as it lies, which re-packs it in every call: a cost per
call, not per token, so it eats most where a reducer has made the sequence short. With weights packed before
that, the time of a prefill goes with its tokens. Figures in docs/performance.md.

For inference only. The packed copy lies beside the weight, so memory doubles; saving, tying and whatever else
looks at parameters sees what it saw before.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NARROW = 1024
"""Up to so many inputs the packed product is the faster one for a single row too. Plain BLAS takes one dot
product an output, and short ones cost more to begin than to run. From two rows on packing gains."""


class PackedLinear(nn.Linear):
    """nn.Linear, [..., in] -> [..., out], that multiplies by a packed copy of its weight.

    The copy is made once: changing the weight afterwards changes nothing but gradients, for which the plain
    product is used.
    """

    packed: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> "PackedLinear":
        """Takes over the parameters (the same objects) of a float32 layer on the CPU."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias = linear.weight, linear.bias
        made.train(linear.training)
        made.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        return made

    def forward(self, input: Tensor) -> Tensor:
        single = input.numel() == self.in_features > NARROW
        if single or torch.is_grad_enabled() or input.dtype is not torch.float32:
            return F.linear(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights there have a packed form: float32 on a CPU."""
    return (device.type, dtype) == ("cpu", torch.float32)


def pack(model: nn.Module) -> int:
    """Replaces every plain nn.Linear of a float32 model on the CPU by a `PackedLinear`, in place.

    Layers of subclasses (LoRA, quantised), in other dtypes or on other devices stay as they are.

    Returns:
        Bytes of the packed copies; 0 where this torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    total = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.dtype is not torch.float32:
                continue
            if child.weight.device.type != "cpu":
                continue
            setattr(parent, name, PackedLinear.of(child))
            total += child.weight.nbytes
    return total
