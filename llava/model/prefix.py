"""Keys and values of a prompt's beginning, computed once and shared by every prompt that begins so.

All questions of a run begin with the same system prompt; all questions about a picture begin with the same
visual tokens too. Attention is causal, so what comes later cannot change them: to go on from a prefix gives
what the whole prompt would give (tested), at the price of the question alone.

    start = begin(model, ids_before_the_image)                     # 1 row, once a run
    seen = extend(model, start, model.project(tokens), [0] * n)    # n rows, once a picture
    new = answer(model, seen, question_ids, rows)                  # as many rows as questions

A Prefix is never changed: each step works on a copy of the rows it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin

from llava.model.llava_arch import CACHE_NAME, LlavaMetaForCausalLM


@dataclass(frozen=True)
class Prefix:
    """The beginnings of `rows` prompts, P columns each, padding anywhere between them.

    Attributes:
        layers: keys and values of every layer, [rows, kv heads, P, head width] each.
        mask: [rows, P] bool, False where a column is padding. A row's positions count its True columns.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def length(self) -> int:
        """P, columns with padding."""
        return self.mask.shape[1]

    def cache(self, rows: Sequence[int]) -> DynamicCache:
        """A copy of these rows, in this order, each as often as it is named, for generation to append to."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            index = torch.tensor(rows, device=keys.device)  # layers may be spread over devices
            cache.update(keys.index_select(0, index), values.index_select(0, index), number)
        return cache


@torch.inference_mode()
def begin(model: LlavaMetaForCausalLM, ids: Tensor) -> Prefix:
    """The prefix of one prompt's first ids, [L] int64, without images; L may be 0."""
    start = Prefix((), torch.ones(1, 0, dtype=torch.bool, device=model.device))  # one row, no columns
    return (
        extend(model, start, [model.get_input_embeddings()(ids.to(model.device))], [0]) if len(ids) else start
    )


@torch.inference_mode()
def extend(
    model: LlavaMetaForCausalLM, prefix: Prefix, blocks: Sequence[Tensor], rows: Sequence[int]
) -> Prefix:
    """One row per block: row rows[i] of `prefix`, then the embeddings blocks[i], [L_i, hidden].

    Shorter blocks are padded on their left.
    """
    embeds, mask = _padded(blocks, prefix, rows)
    cache = prefix.cache(rows)
    model.get_model()(
        inputs_embeds=embeds.to(model.dtype),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp_min(0)[:, prefix.length :],
        use_cache=True,
        **{CACHE_NAME: cache},
    )
    layers: list[Any] = cache.layers
    return Prefix(tuple((layer.keys, layer.values) for layer in layers), mask)


@torch.inference_mode()
def answer(
    model: LlavaMetaForCausalLM,
    prefix: Prefix,
    ids: Sequence[Tensor],
    rows: Sequence[int],
    *,
    num_beams: int = 1,
    **kwargs,
):
    """transformers' generate, after row rows[i] of `prefix` and ids[i], [L_i] int64, none of them empty.

    Returns the new ids, [len(ids), <= max_new_tokens] int64, as `model.generate` does for whole prompts; what
    looks at the ids so far (penalties, stop strings) sees just these, as it does there.

    Args:
        kwargs: what `GenerationMixin.generate` takes (max_new_tokens, do_sample, ...), but not
            num_return_sequences.
    """
    text = model.get_input_embeddings()(torch.cat(list(ids)).to(model.device))
    embeds, mask = _padded(text.split(list(map(len, ids))), prefix, rows)
    return GenerationMixin.generate(
        model,
        # generate wants the columns of the cache too, and cuts them off unread.
        inputs_embeds=pad(embeds, (0, 0, prefix.length, 0)),
        attention_mask=mask.long(),
        num_beams=num_beams,
        # It repeats embeddings and mask for its beams by itself, but not a cache.
        **{CACHE_NAME: prefix.cache([row for row in rows for _ in range(num_beams)])},
        **kwargs,
    )


def _padded(blocks: Sequence[Tensor], prefix: Prefix, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The blocks padded on their left, [B, L, hidden], and the mask of prefix and blocks, [B, P + L]."""
    longest = max(map(len, blocks))
    lengths = torch.tensor([len(block) for block in blocks], device=prefix.mask.device)
    mask = torch.arange(longest, device=prefix.mask.device) >= longest - lengths[:, None]
    embeds = torch.stack([pad(block, (0, 0, longest - len(block), 0)) for block in blocks])
    return embeds, torch.cat([prefix.mask[list(rows)], mask], dim=1)
