"""What goes into a reducer and what comes out: the only place where towers and reducers meet."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisionFeatures:
    """What a vision tower hands to a reducer, for B images of N patches each.

    Attributes:
        patches: [B, N, C] hidden states of the selected layer, without CLS; any float dtype.
        query: [B, C] q_proj output (bias included, unscaled, heads concatenated) of the CLS row in the
            tower's last block, or None where the tower has no CLS token.
        key: [B, N + 1, C] k_proj output of the tower's last block, CLS row first; [B, N, C] where the tower
            has no CLS token.
        num_heads: heads of that block. PruMerge reads q and k as one wide head; others split them.
        grid: (rows, columns) of the patches, rows * columns == N, raster order.

    Further fields are None unless the tower was asked for them and can give them:
        cls: [B, 1, C] the CLS row of the layer the patches come from.
        mean_query: [B, C] mean of the patches' q_proj outputs in the tower's last block.
        probe_attention: [B, N] attention of SigLIP's pooling head over the patches, mean over its heads.
    """

    patches: Tensor
    query: Tensor | None
    key: Tensor
    num_heads: int
    grid: tuple[int, int]
    cls: Tensor | None = None
    mean_query: Tensor | None = None
    probe_attention: Tensor | None = None

    @property
    def has_cls(self) -> bool:
        return self.query is not None

    @property
    def patch_key(self) -> Tensor:
        """[B, N, C] the keys of the patches alone."""
        return self.key[:, 1:] if self.has_cls else self.key

    def __getitem__(self, rows: slice) -> "VisionFeatures":
        """The features of some of the images."""
        return self._map(lambda tensor: tensor[rows])

    def float(self) -> "VisionFeatures":
        """The same in float32: a copy, or itself where it is so already."""
        return self._map(lambda tensor: tensor.float())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "VisionFeatures":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


@dataclass(frozen=True)
class ReducedTokens:
    """Few tokens per image, and where each came from.

    Attributes:
        tokens: [B, Kmax, C], dtype of the patches, zeros after each image's length.
        lengths: [B] int64, tokens of each image.
        kept: [B, Kmax] int64, the patch a token stands for; -1 for an appended token and for padding.
        source: [B, N] int64, the row of `tokens` each patch went to: its own row if kept, else the row
            of the most similar kept patch. -1 where a patch went nowhere.
    """

    tokens: Tensor
    lengths: Tensor
    kept: Tensor
    source: Tensor

    def unbind(self) -> list[Tensor]:
        """One [K_i, C] tensor per image, without padding."""
        lengths: list[int] = self.lengths.tolist()
        if len(set(lengths)) == 1:
            return list(torch.unbind(self.tokens[:, : lengths[0]]))
        return [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]
