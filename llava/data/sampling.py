"""The order samples are seen in: batches of similar length, and of one modality (with images, or text only).

Similar lengths waste little padding; one modality per batch keeps a batch from running the vision tower for a
single sample. The random numbers are drawn as LLaVA draws them, so that one seed gives one order everywhere.
"""

import itertools
from collections.abc import Sequence

import torch


def length_grouped_order(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    by_modality: bool = True,
    generator: torch.Generator | None = None,
) -> list[int]:
    """A permutation of the samples' indices, in the order they are dealt to batches.

    lengths: of each sample, in words or tokens; negative for samples without an image.
    batch_size: samples a device sees at once. world_size: such batches per optimizer step (devices times
        gradient accumulation); `batch_size * world_size` consecutive indices make one mega batch.
    by_modality: mega batches hold samples of one sign of length only, but for the last one.
    generator: shuffles the mega batches; inside them torch's global generator is used. (With samples of one
        sign, or without `by_modality`, it is the only one.)

    Raises ValueError for a length of zero, which is of neither modality.
    """
    if by_modality and 0 in lengths:
        raise ValueError("a sample has length 0; lengths are positive (with image) or negative (text only)")
    images = [i for i, length in enumerate(lengths) if length > 0]
    texts = [i for i, length in enumerate(lengths) if length < 0]
    if not by_modality or not images or not texts:
        return list(itertools.chain(*_mega_batches(lengths, batch_size, world_size, generator)))

    full, rest = [], []
    for group in (images, texts):
        batches = _mega_batches([abs(lengths[i]) for i in group], batch_size, world_size, None)
        batches = [[group[i] for i in batch] for batch in batches]
        full += batches[:-1]
        rest += batches[-1]  # it may be smaller than the others
    order = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    return [*itertools.chain(*order), *sorted(rest)]


def _mega_batches(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[list[int]]:
    """Shuffled indices cut into mega batches, each dealt evenly to the devices, longest samples first."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * world_size
    megas = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return [
        list(itertools.chain(*_deal(sorted(mega, key=lambda i: -lengths[i]), lengths, world_size)))
        for mega in megas
    ]


def _deal(indices: list[int], lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Indices in as many shares of equal count, each index to the share with the smallest sum so far. Where
    the counts cannot be equal, every `shares`-th index."""
    if len(indices) % shares:
        return [indices[start::shares] for start in range(shares)]
    full = len(indices) // shares
    dealt: list[list[int]] = [[] for _ in range(shares)]
    sums = [0.0] * shares
    for index in indices:
        lightest = sums.index(min(sums))
        dealt[lightest].append(index)
        sums[lightest] += lengths[index]
        if len(dealt[lightest]) == full:
            sums[lightest] = float("inf")
    return dealt
