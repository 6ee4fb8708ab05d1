"""Where every token of a batch goes: text ids and visual blocks of any length become one padded batch.

Pure functions. `lay_out` decides with integers alone which row of [text embeddings; visual embeddings] stands
at which position; `gather` moves the embeddings there in one go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError

PADDING = -1
"""In `Layout.source`: nothing stands here."""


@dataclass(frozen=True)
class Layout:
    """A batch of B rows of L positions, before any embedding is computed. All tensors on the CPU.

    Attributes:
        text_ids: [T] int64, the text ids of all samples one after the other, no placeholders, no padding.
        source: [B, L] int64, which row of cat([text embeddings [T], visual embeddings [V]]) stands here, or
            PADDING.
        attention_mask: [B, L] bool, where something stands.
        position_ids: [B, L] int64, counted from 0 at the first token of each sample; 0 on padding.
        labels: [B, L] int64, IGNORE_INDEX on visual tokens and padding; None if there were none.
        lengths: tokens of each sample.
        truncated: samples that were longer than the bound.
    """

    text_ids: Tensor
    source: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    lengths: tuple[int, ...]
    truncated: int

    @property
    def padded(self) -> bool:
        """Whether the samples differ in length."""
        return min(self.lengths) != max(self.lengths)


def split_padding(values: Tensor | Sequence[Tensor], attention_mask: Tensor | None) -> list[Tensor]:
    """One 1-D tensor on the CPU per sample, without the positions the mask excludes.

    Args:
        values: [B, L] ids or labels, or B 1-D tensors of any length (then there is no mask).
        attention_mask: [B, L], or None where every position counts.
    """
    if not isinstance(values, Tensor):
        assert attention_mask is None, "a list of prompts takes no attention_mask: nothing in it is padded"
        return [value.cpu() for value in values]
    rows = values.cpu().unbind()
    if attention_mask is None:
        return list(rows)
    return [row[mask] for row, mask in zip(rows, attention_mask.bool().cpu(), strict=True)]


def lay_out(
    input_ids: Sequence[Tensor],
    visual_lengths: Sequence[int],
    labels: Sequence[Tensor] | None = None,
    *,
    padding_side: str = "right",
    max_length: int | None = None,
) -> Layout:
    """Puts each visual block where its placeholder stands.

    Args:
        input_ids: B 1-D tensors of ids, IMAGE_TOKEN_INDEX for each image; a sample may have any number.
        visual_lengths: tokens of each visual block, in the order of the placeholders over the whole batch.
        labels: B 1-D tensors like `input_ids`, or None.
        padding_side: "right" (training) or "left" (generation).
        max_length: samples are cut to this many tokens at their end; None: never.

    Raises:
        UserError: placeholders and visual blocks differ in number.
    """
    placeholders = sum(int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in input_ids)
    if placeholders != len(visual_lengths):
        raise UserError(
            f"the prompts have {placeholders} <image> placeholders but {len(visual_lengths)} images: give "
            "one image for each"
        )

    num_text = sum(len(ids) for ids in input_ids) - placeholders
    # The visual blocks follow the text: block i is rows visual_starts[i] ... of the concatenation.
    visual_starts = num_text + torch.tensor([0, *visual_lengths]).cumsum(0)
    text_seen = images_seen = truncated = 0
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for sample, ids in enumerate(input_ids):
        is_image = ids == IMAGE_TOKEN_INDEX
        # Each position stands for one row, or for as many as its image has.
        repeats = torch.ones_like(ids)
        starts = text_seen + (~is_image).cumsum(0) - 1
        images = images_seen + int(is_image.sum())
        repeats[is_image] = torch.tensor(visual_lengths[images_seen:images], dtype=ids.dtype)
        starts[is_image] = visual_starts[images_seen:images]
        ends = repeats.cumsum(0)
        length = int(repeats.sum())
        within = torch.arange(length) - (ends - repeats).repeat_interleave(repeats)
        sources.append((starts.repeat_interleave(repeats) + within)[:max_length])
        truncated += len(sources[-1]) < length
        if labels is not None:
            label = labels[sample].masked_fill(is_image, IGNORE_INDEX)
            targets.append(label.repeat_interleave(repeats)[:max_length])
        text_seen += len(ids) - int(is_image.sum())
        images_seen = images

    all_ids = torch.cat(list(input_ids))
    source = _pad(sources, PADDING, padding_side)
    mask = source != PADDING
    return Layout(
        text_ids=all_ids[all_ids != IMAGE_TOKEN_INDEX],
        source=source,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0) * mask,
        labels=None if labels is None else _pad(targets, IGNORE_INDEX, padding_side),
        lengths=tuple(len(source) for source in sources),
        truncated=truncated,
    )


def gather(layout: Layout, text: Tensor, visual: Sequence[Tensor]) -> Tensor:
    """The embeddings of the batch, [B, L, D]; zeros on padding.

    Args:
        text: [T, D] embeddings of `layout.text_ids`.
        visual: the visual blocks, [K_i, D] each, same dtype and device.
    """
    rows = torch.cat([text, *visual])
    positions = layout.attention_mask.flatten().nonzero().squeeze(1)
    taken = layout.source.flatten()[positions]
    embeds = rows.new_zeros(layout.source.numel(), rows.shape[-1])
    # Every row is used at most once, so the gradient needs no accumulation.
    embeds = embeds.index_copy(0, positions.to(rows.device), rows.index_select(0, taken.to(rows.device)))
    return embeds.view(*layout.source.shape, -1)


def _pad(rows: list[Tensor], value: int, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
