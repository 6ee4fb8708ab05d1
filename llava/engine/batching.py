"""Which requests, and which rows, are computed together."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch

from llava.engine.requests import Request, key_of

CHUNK_IMAGES, CHUNK_QUESTIONS = 32, 128
TOKENS_AT_ONCE = 16_384
"""More than this in one forward pass makes no device faster, and takes memory."""


def chunked(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """The requests in chunks whose images are held in memory together, all questions of an image in one."""
    groups: dict[Hashable, list[Request]] = {}
    for number, request in enumerate(requests):
        key = tuple(map(key_of, request.images)) or number
        groups.setdefault(key, []).append(request)
    chunk: list[Request] = []
    images = 0
    for group in groups.values():
        chunk += group
        images += len(group[0].images)
        if images >= CHUNK_IMAGES or len(chunk) >= CHUNK_QUESTIONS:
            yield chunk
            chunk, images = [], 0
    if chunk:
        yield chunk


def batches(lengths: Sequence[int], fits: Callable[[int, int], bool]) -> Iterator[slice]:
    """Cuts rows of these lengths, in descending order, into what is computed together.

    A batch holds rows as long as `fits(rows, longest)`, TOKENS_AT_ONCE is not exceeded, and at most an eighth
    of it is padding (32 tokens are cheaper than another pass); one row in any case.
    """
    start = padding = 0
    for place, length in enumerate(lengths):
        rows, longest = place + 1 - start, lengths[start]
        padding += longest - length
        too_large = not fits(rows, longest) or rows * longest > TOKENS_AT_ONCE
        if rows > 1 and (too_large or padding > max(32, rows * longest // 8)):
            yield slice(start, place)
            start, padding = place, 0
    if lengths:
        yield slice(start, len(lengths))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
