"""What methods share that compare all patches with each other: cosines, greedy coverage, means of groups.

B images, N patches, C channels. An image's choice must not change with the batch it comes in: the numbers it
hangs on are sums of one row each, and products made image by image.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.ops import require_finite

LOOK_AHEAD = 48
"""Candidates that `cover` brings up to date at a time."""


def unit(x: Tensor) -> Tensor:
    """[..., C] -> float32 of norm 1; a row of zeros stays one."""
    return F.normalize(x.float(), dim=-1)


@torch.no_grad()
def cosine(x: Tensor) -> Tensor:
    """[B, N, C] -> [B, N, N] float32, symmetric: cosine similarities of all rows; 0 with a row of zeros."""
    batch, length, _ = x.shape
    out = torch.empty(batch, length, length, device=x.device)
    step = -(-length // 4)
    for similarity, rows in zip(out, x, strict=True):
        rows = rows.float()
        for start in range(0, length, step):  # four blocks of rows, from the diagonal on: 10/16 of the work
            block = rows[start : start + step] @ rows[start:].T
            similarity[start : start + step, start:] = block
            similarity[start:, start : start + step] = block.T
    norm = out.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
    return out.div_(norm.unsqueeze(2)).div_(norm.unsqueeze(1))


@torch.no_grad()
def cover(
    covers: Tensor,
    count: int,
    weight: Tensor | None = None,
    combine: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """Greedy facility location: one candidate after another, each time the one that adds the most.

    best_i = 0; repeat: j = argmax weight_j sum_i max(0, covers_ji - best_i) over candidates not yet chosen,
    the first of equals; best_i <- max(best_i, covers_ji).

    What a candidate adds only ever falls, so its last known value is a bound: a few candidates with the
    largest bounds are brought up to date, until the largest of all is one of them (lazy greedy, Minoux 1978).
    The device is asked once or twice for each choice whether it is.

    Args:
        covers: [B, N, R], how well candidate j covers row i.
        count: how many to choose, at most N.
        weight: [B, N], not negative; None is 1.
        combine: of gain and weight, rising with the gain: `torch.mul` or `torch.add`.

    Returns:
        [B, count] int64, in the order of choice.

    Raises:
        ReducerInputError: a value is NaN or infinite.
    """
    batch, length, rows = covers.shape
    flat = covers.flatten(0, 1)
    first = torch.arange(0, batch * length, length, device=covers.device).unsqueeze(1)  # row of each image
    weight = covers.new_ones(batch, length) if weight is None else weight
    best = covers.new_zeros(batch, 1, rows)
    bound = combine(covers.clamp(min=0).sum(2), weight)
    require_finite(bound.isfinite().all(1).tolist())
    chosen: list[Tensor] = []
    pick = bound.argmax(1, keepdim=True)
    while len(chosen) < count:
        # The largest bound itself is among them, which the top of many equals need not hold.
        top = bound.topk(min(LOOK_AHEAD, length - len(chosen))).indices
        some = torch.cat([pick, top], 1)
        candidates = flat.index_select(0, (some + first).flatten()).view(batch, some.shape[1], rows)
        gain = candidates.sub_(best).clamp_(min=0).sum(2)
        bound.scatter_(1, some, combine(gain, weight.gather(1, some)))
        pick = bound.argmax(1, keepdim=True)
        if (some == pick).any(1).all():
            chosen.append(pick)
            best = torch.maximum(best, flat.index_select(0, (pick + first).flatten()).unsqueeze(1))
            bound.scatter_(1, pick, -torch.inf)
            pick = bound.argmax(1, keepdim=True)
    return torch.cat(chosen, 1)


def group_mean(x: Tensor, group: Tensor, count: int) -> Tensor:
    """Means of x [B, N, C] over groups: [B, count, C] float32, zero where a group is empty.

    Args:
        group: [B, N] int64, the group of each row; rows with a number outside 0 ... count - 1 belong to none.
    """
    member = (group.unsqueeze(1) == torch.arange(count, device=x.device).unsqueeze(1)).float()
    return torch.bmm(member / member.sum(2, keepdim=True).clamp(min=1), x.float())
