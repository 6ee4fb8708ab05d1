"""PruMerge's loops for a CPU, compiled by numba at the first call and kept on disk for the next process.

What `ops` says in some sixty tensor operations, which pass over keys and patches again and again, is said
here row by row: keys are read once for scores and norms, and the largest similarities of a row are found by
halving the range of their bits, a whole vector at a time. The one large product stays torch's. Where these
loops work, `ops.compiled_for` says; tests hold the two ways to the same tokens.

One thread. B images, N patches, C channels, K kept rows; float32 throughout.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Sums may be reordered, so that they run over vectors, and so the same for every row; NaN stays NaN.
SUMS = {"reassoc", "contract", "nsz"}


def _compile(function):
    """numba's compiler; what it made is kept for the next process where there is a place to keep it."""
    try:
        return njit(cache=True, nogil=True, fastmath=SUMS)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(nogil=True, fastmath=SUMS)(function)


def attention_and_norms(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C] and [B, N + 1, C] -> `ops.cls_attention` [B, N], and the norm of each key [B, N + 1]."""
    batch, rows, _ = key.shape
    attention, norms = key.new_empty(batch, rows - 1), key.new_empty(batch, rows)
    _attention_and_norms(
        query.contiguous().numpy(), key.contiguous().numpy(), attention.numpy(), norms.numpy()
    )
    return attention, norms


@_compile
def _attention_and_norms(query, key, attention, norms):
    rows, width = key.shape[1], key.shape[2]
    scale = np.float32(1 / np.sqrt(width))
    scores = np.empty(rows, np.float32)
    for image in range(key.shape[0]):
        largest = np.float32(-np.inf)
        for row in range(rows):
            dot, square = np.float32(0), np.float32(0)
            for channel in range(width):
                value = key[image, row, channel]
                dot += query[image, channel] * value
                square += value * value
            scores[row], norms[image, row] = dot * scale, np.sqrt(square)
            largest = max(largest, scores[row])
        total = np.float32(0)
        for row in range(rows):
            scores[row] = np.exp(scores[row] - largest)
            total += scores[row]
        for row in range(1, rows):
            attention[image, row - 1] = scores[row] / total


def outlier_count(descending: Tensor) -> Tensor:
    """[B, N] sorted from the largest -> [B] int64: `ops.outlier_count`."""
    counts = torch.empty(len(descending), dtype=torch.int64)
    _outlier_count(descending.contiguous().numpy(), counts.numpy())
    return counts


@_compile
def _outlier_count(descending, counts):
    for image in range(len(descending)):
        values = descending[image]
        quartile = _quantile(values, 0.25), _quantile(values, 0.75)
        fence = quartile[1] + np.float32(1.5) * (quartile[1] - quartile[0])
        counts[image] = 0
        for value in values:
            counts[image] += value > fence


@_compile
def _quantile(descending, q):
    last = len(descending) - 1
    below = int(q * last)
    lower, upper = descending[last - below], descending[max(last - below - 1, 0)]
    return lower + (upper - lower) * np.float32(q * last - below)


def merge(
    patches: Tensor,
    key: Tensor,
    norm: Tensor,
    weight: Tensor,
    order: Tensor,
    count: list[int],
    neighbours: int,
    images_at_a_time: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[bool]]:
    """`ops.merge_nearest`, the appended tokens and the provenance in one go, each image with its own count.

    Args:
        patches: [B, N, C].
        key: [B, N + 1, C], CLS first.
        norm: [B, N + 1], the norm of each key.
        weight: [B, N].
        order: [B, N] int64, the patches of each image, kept ones first.
        count: how many are kept, for each image.
        neighbours: how many to merge into each kept patch, at most; N - 1 where there are fewer.
        images_at_a_time: for one product. Beside the result, C + N float32 are held for each of their rows.

    Returns:
        tokens [B, max count + 1, C]: the kept patches with their neighbours, the appended token, zeros;
        lengths, kept and source as in `ReducedTokens`; and whether each image is finite.
    """
    batch, length, width = patches.shape
    most = max(count, default=0)
    # Whole blocks of 16 rows, as in ops: an image's similarities must not change with its batch.
    rows = -(-most // 16) * 16
    key = key.contiguous()
    tokens, kept = patches.new_zeros(batch, most + 1, width), order.new_full((batch, most + 1), -1)
    source, lengths = torch.empty_like(order), order.new_empty(batch)
    finite, counts = np.empty(batch, np.bool_), np.array(count, np.int64)
    neighbours = min(neighbours, length - 1)
    inputs = [each.contiguous().numpy() for each in (key, norm, order, patches, weight)]
    outputs = [tokens.numpy(), lengths.numpy(), kept.numpy(), source.numpy(), finite]
    for start in range(0, batch, images_at_a_time):
        stop = min(start + images_at_a_time, batch)
        some = slice(start, stop)
        key_, norm_, order_, *rest = (each[some] for each in inputs)
        own = key.new_zeros(stop - start, rows, width)
        _scaled_rows(key_, norm_, order_, counts[some], own.numpy())
        similarity = torch.bmm(key[some, 1:], own.transpose(1, 2)).numpy()
        _merge(similarity, norm_, order_, *rest, counts[some], neighbours, *(each[some] for each in outputs))
    return tokens, lengths, kept, source, finite.tolist()


@_compile
def _inverse(norm):
    return np.float32(1) / max(norm, np.float32(1e-12))


@_compile
def _scaled_rows(key, norm, order, count, out):
    """The keys of the kept patches, divided by their norms."""
    for image in range(len(count)):
        for row in range(count[image]):
            place = order[image, row] + 1
            inverse = _inverse(norm[image, place])
            for channel in range(out.shape[2]):
                out[image, row, channel] = key[image, place, channel] * inverse


@_compile
def _merge(
    similarity, norm, order, patches, weight, count, neighbours, tokens, lengths, kept, source, finite
):
    """Of similarities [B, N, rows] only what belongs to the counted rows is read."""
    length, width = patches.shape[1], patches.shape[2]
    by_row = np.empty((similarity.shape[2], length), np.float32)
    best, nearest = np.empty(length, np.float32), np.empty(length, np.int32)
    near = np.empty(length + 1, np.int64)
    for image in range(len(count)):
        rows = count[image]
        lengths[image] = rows + 1
        for place in range(length):
            inverse = _inverse(norm[image, place + 1])
            for row in range(rows):
                by_row[row, place] = similarity[image, place, row] * inverse
        best[:], nearest[:] = -np.inf, 0
        for row in range(rows):
            for place in range(length):
                value = by_row[row, place]
                nearest[place] = np.int32(row) if value > best[place] else nearest[place]
                best[place] = value if value > best[place] else best[place]
        source[image] = nearest
        _add_weighted(tokens[image, rows], patches[image], weight[image], order[image, rows:])
        for row in range(rows):
            own = order[image, row]
            kept[image, row], source[image, own] = own, row
            by_row[row, own] = -np.inf
            _largest(by_row[row], neighbours, near)
            tokens[image, row] = patches[image, own]
            _add_weighted(tokens[image, row], patches[image], weight[image], near[:neighbours])
        # Every patch went into some token; zero times what is not finite is NaN.
        check = np.float32(0)
        for place in range(length + 1):
            check += norm[image, place] * np.float32(0)
        for row in range(rows + 1):
            for channel in range(width):
                check += tokens[image, row, channel] * np.float32(0)
        finite[image] = check == 0


@_compile
def _add_weighted(out, patches, weight, places):
    """[C] += the sum over some of [N, C] patches, each times its weight.

    Four at a time, so that `out` is read and written less often.
    """
    fours = len(places) // 4 * 4
    for at in range(0, fours, 4):
        a, b, c, d = places[at], places[at + 1], places[at + 2], places[at + 3]
        _add_four(
            out, patches[a], patches[b], patches[c], patches[d], weight[a], weight[b], weight[c], weight[d]
        )
    for at in range(fours, len(places)):
        values, share = patches[places[at]], weight[places[at]]
        for channel in range(len(out)):
            out[channel] += values[channel] * share


@_compile
def _add_four(out, a, b, c, d, share_a, share_b, share_c, share_d):
    for channel in range(len(out)):
        out[channel] += (a[channel] * share_a + b[channel] * share_b) + (
            c[channel] * share_c + d[channel] * share_d
        )


@_compile
def _largest(values, number, places):
    """Where the `number` largest of `values` are, in no order, into `places`, which is one longer than these.

    Overwrites values.
    """
    bits = values.view(np.int32)
    low, high = np.int64(2**31 - 1), np.int64(2**31)
    for place in range(len(bits)):  # integers in the order of the floats
        bits[place] ^= (bits[place] >> 31) & np.int32(0x7FFFFFFF)
        low = min(low, np.int64(bits[place]))
    # At least `number` values are not below low, fewer not below high, until no integer lies between.
    found = len(bits)
    while found != number and high - low > 1:
        middle = (low + high) // 2
        there = np.int32(0)
        for place in range(len(bits)):
            there += np.int32(bits[place] >= np.int32(middle))
        if there >= number:
            low, found = middle, np.int64(there)
        else:
            high = middle
    ties = found - number  # values equal to low, of which so many are left out
    found = 0
    for place in range(len(bits) - 1, -1, -1):
        places[found] = place  # overwritten by the next unless it counts: cheaper than a branch
        counts = bits[place] >= low
        if ties and bits[place] == low:
            counts, ties = False, ties - 1
        found += counts
