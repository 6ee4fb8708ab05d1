"""Prompts with placeholders, as a processor makes them, to a batch of embeddings with few visual tokens.

Positions are counted in two ways: LONG, as the processor and so the user counts them (576 placeholders an
image), and SHORT, as the language model sees them. A cache of keys and values is short, so what follows it
needs to know both (`Past`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput, logging

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.splice import gather, lay_out, split_padding
from llava.plug.families import Visual

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Past:
    """What a cache holds, in both ways of counting.

    Attributes:
        long: positions as the user counts them.
        mask: [B, short] bool, which of the cached positions count.
    """

    long: int
    mask: Tensor

    def remember(self, cache: Cache | None, output: Any) -> None:
        """Leaves this with the cache that was given or is returned, for the next call to find."""
        if cache is None:
            values = output.values() if isinstance(output, ModelOutput) else output
            cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is not None:
            vars(cache)["reduced_past"] = self

    @staticmethod
    def of(cache: Cache | None, attention_mask: Tensor | None, input_ids: Tensor) -> "Past":
        """What was left with the cache, and what it has grown by since, where both ways are the same.

        Args:
            attention_mask: the user's, over past and new positions, or None: everything counts.
            input_ids: the new ones; for their batch and device.
        """
        batch, device = len(input_ids), input_ids.device
        known = getattr(cache, "reduced_past", None) or Past(0, torch.ones(batch, 0, dtype=torch.bool))
        grown = (0 if cache is None else cache.get_seq_length()) - known.mask.shape[1]
        if grown < 0:
            raise ValueError(
                "this cache holds reduced images and was cropped, so the positions of prompt and cache no "
                "longer match: start from a copy taken before"
            )
        long = known.long + grown
        rest = torch.ones(batch, grown, dtype=torch.bool, device=device)
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= long:
            rest = attention_mask[:, known.long : long].bool().to(device)
        # Rows that beams or num_return_sequences have multiplied stand side by side.
        mask = known.mask.to(device).repeat_interleave(batch // len(known.mask), 0)
        return Past(long, torch.cat([mask, rest], dim=1))


@dataclass(frozen=True)
class Short:
    """A batch as the language model gets it.

    Attributes:
        inputs_embeds: [B, S, hidden] of the new positions.
        labels: [B, S] or None.
        after: past and new positions together, as a cache will hold them.
    """

    inputs_embeds: Tensor
    labels: Tensor | None
    after: Past


def shorten(
    input_ids: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    visuals: Mapping[int, Sequence[Visual]],
    embed: Callable[[Tensor], Tensor],
    past: Past,
    *,
    padding_side: str | None = None,
) -> Short:
    """Each run of placeholders becomes its visual tokens; mask and labels go along.

    Args:
        input_ids, labels: [B, L], the new positions alone.
        counts: [B, L] bool, false on padding.
        visuals: the images and videos in the order of the prompts, by the id of their placeholders.
        embed: [T] ids -> [T, hidden].
        padding_side: default where `counts` has it, left where nothing is padded.

    Raises:
        ValueError: placeholders and visual tokens do not belong together.
    """
    if padding_side is None:
        # Unpadded rows may differ in length now; whoever decodes by hand reads the last position.
        padding_side = "left" if counts[:, -1].all() else "right"
    ids, kept, width = input_ids.clone(), counts.clone(), input_ids.shape[1]
    blocks: list[tuple[int, Tensor]] = []
    for token_id, items in visuals.items():
        is_placeholder = (input_ids == token_id) & counts
        places = is_placeholder.flatten().nonzero().squeeze(1)
        sizes = torch.tensor([item.placeholders for item in items], device=places.device)
        ends = sizes.cumsum(0)
        if len(places) != ends[-1]:
            raise ValueError(
                f"Image features and image tokens do not match: the prompts hold {len(places)} placeholders "
                f"(id {token_id}), the {len(items)} images or videos need {int(ends[-1])}; use this model's "
                "own processor, one placeholder in the text for each image, and no truncation"
            )
        first, last = places[ends - sizes], places[ends - 1]
        if ((last - first + 1 != sizes) | (first // width != last // width)).any():
            raise ValueError(
                "Image features and image tokens do not match: the placeholders of one image do not stand "
                f"side by side (id {token_id}); use this model's own processor"
            )
        # An image's first placeholder becomes -200, which `lay_out` knows; its others are dropped.
        ids.view(-1)[first] = IMAGE_TOKEN_INDEX
        kept &= ~is_placeholder | (ids == IMAGE_TOKEN_INDEX)
        blocks += zip(first.tolist(), (item.tokens for item in items), strict=True)
        if labels is not None and (labels[is_placeholder] != IGNORE_INDEX).any():
            logger.warning_once(
                "labels count image placeholders, which a reduced model drops: a trainer that divides by the "
                "number of labels (num_items_in_batch) makes the loss too small; set them to -100"
            )
    tokens = [block for _, block in sorted(blocks, key=lambda block: block[0])]

    layout = lay_out(
        split_padding(ids, kept),
        [len(block) for block in tokens],
        None if labels is None else split_padding(labels, kept),
        padding_side=padding_side,
    )
    device, short_labels = input_ids.device, layout.labels
    if short_labels is not None:
        if padding_side == "left":
            # Our padding would predict a row's first token; one by one nothing predicts it.
            first = layout.attention_mask.int().argmax(1, keepdim=True)
            short_labels = short_labels.scatter(1, first, IGNORE_INDEX)
        short_labels = short_labels.to(device)
    text = embed(layout.text_ids.to(device))
    embeds = gather(layout, text, [block.to(text) for block in tokens])
    mask = torch.cat([past.mask, layout.attention_mask.to(device)], dim=1)
    return Short(embeds, short_labels, Past(past.long + width, mask))


def positions_of(mask: Tensor) -> Tensor:
    """[B, L] mask -> [B, L] positions, counted from 0 at each row's first real one."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
