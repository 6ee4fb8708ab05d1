"""What goes into a reducer and what comes out: the only place where towers and reducers meet."""

from dataclasses import dataclass

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
    """

    patches: Tensor
    query: Tensor | None
    key: Tensor
    num_heads: int
    grid: tuple[int, int]

    @property
    def has_cls(self) -> bool:
        return self.query is not None

    def __getitem__(self, rows: slice) -> "VisionFeatures":
        """The features of some of the images."""
        query = None if self.query is None else self.query[rows]
        return VisionFeatures(self.patches[rows], query, self.key[rows], self.num_heads, self.grid)

    def float(self) -> "VisionFeatures":
        """The same in float32: a copy, or itself where it is so already."""
        query = None if self.query is None else self.query.float()
        return VisionFeatures(self.patches.float(), query, self.key.float(), self.num_heads, self.grid)


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
