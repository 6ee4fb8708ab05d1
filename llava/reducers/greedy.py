"""What methods share that compare all patches with each other: cosines, greedy coverage, means of groups.

B images, N patches, C channels. Choices hang on sums of one row each and on products whose shape does not
depend on the batch, so that an image's choice is the same alone and among others.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.ops import require_finite


@torch.no_grad()
def cosine(x: Tensor) -> Tensor:
    """[B, N, C] -> [B, N, N] float32, symmetric: cosine similarities of all rows; 0 with a row of zeros."""
    x = F.normalize(x.float(), dim=2)
    batch, length, _ = x.shape
    out = x.new_empty(batch, length, length)
    step = -(-length // 4)
    for start in range(0, length, step):  # four blocks of rows, each from its diagonal on: 10/16 of the work
        block = torch.bmm(x[:, start : start + step], x[:, start:].transpose(1, 2))
        out[:, start : start + step, start:] = block
        out[:, start:, start : start + step] = block.transpose(1, 2)
    return out


@torch.no_grad()
def cover(covers: Tensor, count: int, weight: Tensor | float = 1.0, bonus: Tensor | float = 0.0) -> Tensor:
    """Greedy facility location: one candidate after another, each time the one that adds the most.

    best_i = 0; repeat: j = argmax weight_j sum_i max(0, covers_ji - best_i) + bonus_j over candidates not yet
    chosen, the first of equals; best_i <- max(best_i, covers_ji).

    What a candidate adds only ever falls, so its last known value is a bound from above: a few candidates with
    the largest bounds are brought up to date, until one that is up to date is the largest (lazy greedy,
    Minoux 1978). The device is asked once or twice for each choice whether it is.

    Args:
        covers: [B, N, R], how well candidate j covers row i.
        count: how many to choose, at most N.
        weight, bonus: [B, N], or one number for all; weights are not negative.

    Returns:
        [B, count] int64, in the order of choice.

    Raises:
        ReducerInputError: a value is NaN or infinite.
    """
    batch, length, rows = covers.shape
    flat, first = covers.flatten(0, 1), torch.arange(0, batch * length, length, device=covers.device)[:, None]
    weight, bonus = (torch.as_tensor(x, device=covers.device).expand(batch, length) for x in (weight, bonus))
    best = covers.new_zeros(batch, 1, rows)
    bound = covers.clamp(min=0).sum(2) * weight + bonus
    require_finite(bound.isfinite().all(1).tolist())
    chosen = []
    for _ in range(count):
        is_known = torch.zeros_like(bound, dtype=torch.bool)
        while not is_known.gather(1, pick := bound.argmax(1, keepdim=True)).all():
            top = torch.cat([pick, bound.topk(min(16, length)).indices], 1)
            candidates = flat.index_select(0, (top + first).flatten()).view(batch, -1, rows)
            gain = candidates.sub_(best).clamp_(min=0).sum(2) * weight.gather(1, top) + bonus.gather(1, top)
            # The minimum keeps those already chosen at minus infinity.
            bound.scatter_(1, top, torch.minimum(gain, bound.gather(1, top)))
            is_known.scatter_(1, top, True)
        chosen.append(pick)
        bound.scatter_(1, pick, -torch.inf)
        best = torch.maximum(best, flat.index_select(0, (pick + first).flatten()).unsqueeze(1))
    return torch.cat(chosen, 1)


def group_mean(x: Tensor, group: Tensor, count: int) -> Tensor:
    """Means of x [B, N, C] over groups: [B, count, C] float32, zero where a group is empty.

    Args:
        group: [B, N] int64, the group of each row; rows with a number outside 0 ... count - 1 belong to none.
    """
    member = (group.unsqueeze(1) == torch.arange(count, device=x.device).unsqueeze(1)).float()
    return torch.bmm(member / member.sum(2, keepdim=True).clamp(min=1), x.float())
