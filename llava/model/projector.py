"""From the vision tower's width to the language model's: the only trained part of LLaVA's first stage."""

import re

from torch import nn

from llava.errors import UserError

PROJECTOR_TYPES = "linear, mlpNx_gelu (mlp2x_gelu is LLaVA-1.5's), identity"


def build_projector(projector_type: str, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """The module that maps visual tokens [..., mm_hidden_size] to embeddings [..., hidden_size].

    `linear` is one Linear (LLaVA-1); `mlpNx_gelu` is N Linears with an exact GELU between any two, so that
    its parameters are called 0, 2, ...; `identity` is nothing, and needs equal widths.
    """
    if projector_type == "linear":
        return nn.Linear(mm_hidden_size, hidden_size)
    if projector_type == "identity":
        if mm_hidden_size != hidden_size:
            raise UserError(
                f"mm_projector_type 'identity' needs equal widths, but the tower has {mm_hidden_size} and "
                f"the language model {hidden_size}: use mlp2x_gelu"
            )
        return nn.Identity()
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type):
        layers: list[nn.Module] = [nn.Linear(mm_hidden_size, hidden_size)]
        for _ in range(int(match.group(1)) - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        return nn.Sequential(*layers)
    raise UserError(f"unknown mm_projector_type {projector_type!r}: known are {PROJECTOR_TYPES}")
