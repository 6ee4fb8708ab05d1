"""What goes into a reducer and what comes out: the only place where towers and reducers meet."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

TEXT_FIELDS = ("text_embeds", "text_tokens")
"""The fields of VisionFeatures that come from the question."""


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

    What follows is None unless the reducer says that it reads it (`Reducer.reads`). H heads, D the width of
    the projector's output, e the width CLIP shares between pictures and text.

        cls: [B, 1, C] the CLS row of the hidden states that `patches` are the other rows of.
        cls_attn: [B, H, N] float32, head by head the softmax attention that the CLS row pays to the patches
            in the block whose output `patches` are (the last but one with select_layer -2). CLS takes part
            in the softmax, its column is then dropped.
        block_key: [B, N + 1, C] k_proj output of that block, CLS first; [B, N, C] without CLS token.
        projected: [B, N, D] `patches` after the projector.
        attn_mid, attn_deep: [B, N + 1] the attention each row receives, mean over heads and all queries,
            CLS first, in the block at 9/24 of the depth and in that of cls_attn.
        image_embeds: [B, N, e] CLIP's visual projection of the layer-normed patches.
        text_embeds: for each image [M, e], CLIP's embeddings of the question's M segments.
        text_tokens: for each image [m, D], the language model's embeddings of the question's content words.
            One such tensor in place of a sequence is every image's.
        mean_query: [B, C] mean of the patches' q_proj outputs in the tower's last block.
        probe_attention: [B, N] attention of SigLIP's pooling head over the patches, mean over its heads.
    """

    patches: Tensor
    query: Tensor | None
    key: Tensor
    num_heads: int
    grid: tuple[int, int]
    # Any: whoever reads one has said so, and need not ask again whether it is there.
    cls: Tensor | Any = None
    cls_attn: Tensor | Any = None
    block_key: Tensor | Any = None
    projected: Tensor | Any = None
    attn_mid: Tensor | Any = None
    attn_deep: Tensor | Any = None
    image_embeds: Tensor | Any = None
    text_embeds: Sequence[Tensor] | Any = None
    text_tokens: Sequence[Tensor] | Any = None
    mean_query: Tensor | Any = None
    probe_attention: Tensor | Any = None

    def __post_init__(self) -> None:
        for name in TEXT_FIELDS:
            text = getattr(self, name)
            if isinstance(text, Tensor) and text.ndim == 2:
                object.__setattr__(self, name, [text] * self.patches.shape[0])

    @property
    def has_cls(self) -> bool:
        return self.query is not None

    @property
    def patch_key(self) -> Tensor:
        """[B, N, C] the keys of the patches alone."""
        return self.key[:, 1:] if self.has_cls else self.key

    def __getitem__(self, rows: slice | Tensor) -> "VisionFeatures":
        """The features of some of the images; by their numbers only where no text is given yet."""
        return replace(self, **{name: value[rows] for name, value in self._given().items()})

    def float(self) -> "VisionFeatures":
        """The same in float32: a copy, or itself where it is so already."""
        exact: dict[str, Any] = {
            name: value.float() if isinstance(value, Tensor) else [text.float() for text in value]
            for name, value in self._given().items()
        }
        return replace(self, **exact)

    def _given(self) -> dict[str, Any]:
        """What there is of one entry an image."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("num_heads", "grid")}
        return {name: value for name, value in given.items() if value is not None}


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

    def split(self) -> list["ReducedTokens"]:
        """Each image by itself, B = 1, without padding."""
        rows = zip(self.unbind(), self.lengths.split(1), self.kept, self.source, strict=True)
        return [
            ReducedTokens(tokens[None], length, kept[None, : len(tokens)], source[None])
            for tokens, length, kept, source in rows
        ]
