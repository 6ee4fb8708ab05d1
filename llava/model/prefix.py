"""Keys and values of a prompt's beginning, computed once and shared by every prompt that begins so.

All questions of a run begin with the same system prompt; all questions about a picture begin with the same
visual tokens too. Attention is causal, so what comes later cannot change them: to go on from a prefix gives
what the whole prompt would give (tested), at the price of the question alone.

    start = begin(model, ids_before_the_image)                    # 1 row, once a run
    seen = extend(model, select(start, [0] * n), model.project(tokens))  # n rows, once a picture
    new = answer(model, select(seen, rows), question_ids)         # as many rows as questions

A Prefix is never changed: each step works on a copy of the rows it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from llava.model.llava_llama import LlavaLlamaForCausalLM


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

    def cache(self) -> DynamicCache:
        """A cache that generation may append to: appending makes new tensors, these stay as they are."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, index)
        return cache


def begin(model: LlavaLlamaForCausalLM, ids: Tensor) -> Prefix:
    """The prefix of one prompt's first ids, [L] int64, without images."""
    return extend(model, nothing(model), [model.get_input_embeddings()(ids.to(model.device))])


def nothing(model: LlavaLlamaForCausalLM) -> Prefix:
    """The prefix of a prompt of which nothing is known yet: one row, no columns."""
    return Prefix((), torch.ones(1, 0, dtype=torch.bool, device=model.device))


def select(prefix: Prefix, rows: Sequence[int]) -> Prefix:
    """A prefix of the named rows, in that order, each as often as it is named."""
    index = torch.tensor(rows, device=prefix.mask.device)
    layers = tuple(
        (keys.index_select(0, index), values.index_select(0, index)) for keys, values in prefix.layers
    )
    return Prefix(layers, prefix.mask.index_select(0, index))


@torch.no_grad()
def extend(model: LlavaLlamaForCausalLM, prefix: Prefix, blocks: Sequence[Tensor]) -> Prefix:
    """`prefix` followed in row i by the embeddings blocks[i], [L_i, hidden] (padded on their left)."""
    longest = max(map(len, blocks))
    embeds = blocks[0].new_zeros(len(blocks), longest, blocks[0].shape[1])
    mask = torch.zeros(len(blocks), longest, dtype=torch.bool, device=prefix.mask.device)
    for row, block in enumerate(blocks):
        embeds[row, longest - len(block) :] = block
        mask[row, longest - len(block) :] = True
    mask = torch.cat([prefix.mask, mask], dim=1)
    cache = prefix.cache()
    model.get_model()(
        inputs_embeds=embeds.to(model.dtype),
        attention_mask=mask.long(),
        position_ids=_positions(mask)[:, prefix.length :],
        past_key_values=cache,
        use_cache=True,
    )
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), mask)


@torch.no_grad()
def answer(
    model: LlavaLlamaForCausalLM, prefix: Prefix, ids: Sequence[Tensor], *, num_beams: int = 1, **kwargs
):
    """transformers' generate after row i's prefix and the ids ids[i], [L_i] int64, none of them empty.

    Returns the new ids, [rows, <= max_new_tokens] int64, as `model.generate` does for whole prompts; what
    looks at the ids so far (penalties, stop strings) sees just these, as it does there.

    Args:
        kwargs: what `GenerationMixin.generate` takes (max_new_tokens, do_sample, ...), but not
            num_return_sequences.
    """
    longest = max(map(len, ids))
    text = model.get_input_embeddings()(torch.cat(list(ids)).to(model.device)).split(
        [len(one) for one in ids]
    )
    # What stands under the prefix's columns is never read: their keys and values are there already.
    embeds = text[0].new_zeros(len(ids), prefix.length + longest, text[0].shape[1])
    mask = torch.zeros(len(ids), longest, dtype=torch.bool, device=prefix.mask.device)
    for row, block in enumerate(text):
        embeds[row, embeds.shape[1] - len(block) :] = block
        mask[row, longest - len(block) :] = True
    mask = torch.cat([prefix.mask, mask], dim=1)
    if num_beams > 1:  # generate repeats embeddings and mask itself, but not a cache
        prefix = select(prefix, [row for row in range(prefix.rows) for _ in range(num_beams)])
    return GenerationMixin.generate(
        model,
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        past_key_values=prefix.cache(),
        num_beams=num_beams,
        **kwargs,
    )


def _positions(mask: Tensor) -> Tensor:
    """[rows, P] int64: how many real columns precede each; padding gets 0, which nobody reads."""
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)
