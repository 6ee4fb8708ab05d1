"""CDPruner (NeurIPS 2025): patches relevant to the question and unlike each other, by a determinant."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import cosine, unit
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Reducer):
    """The set with the greatest det L, found greedily, in raster order: L_ij = r_i cos(P_i, P_j) r_j.

    r is the relevance to the question, P the projected patches. Relevance is scaled by each image's own range
    (as released, by that of the whole batch). Where the rank of L is used up before `tokens`, the choice goes
    on without repeating (as released, it turns to NaN and keeps fewer).

    Attributes:
        tokens: how many (all N where there are fewer).
    """

    reads = ("projected", "image_embeds", "text_embeds")

    tokens: int = option(64, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        count = min(self.tokens, features.patches.shape[1])
        chosen = _most_probable(cosine(features.projected), relevance(features), count)
        return pick(features.patches, chosen.sort(1).values)


@torch.no_grad()
def relevance(features: VisionFeatures) -> Tensor:
    """[B, N] from about 0 to about 1: minus the mean cosine of patch and question segments, scaled.

    The minus is the paper's: in CLIP's shared space patches of what the text names are the less similar ones.
    """
    image = unit(features.image_embeds)
    text = image.new_empty(len(image), 1, image.shape[2])
    for mean, segments in zip(text, features.text_embeds, strict=True):
        mean[:] = unit(segments).mean(0)
    score = -(image * text).sum(2)
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    return (score - low + 1e-6) / (high - low).clamp(min=1e-6)


def _most_probable(similarity: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Greedy MAP of the process by incremental Cholesky (Chen et al. 2018), [B, count] int64."""
    batch, length, _ = similarity.shape
    # d_j: by how much det L of the chosen is multiplied if j joins them
    left = relevance.square() * similarity.diagonal(dim1=1, dim2=2)
    require_finite(left.isfinite().all(1).tolist())
    factor = similarity.new_zeros(batch, count, length)  # rows of the Cholesky factor
    chosen = []
    for t in range(count):
        chosen.append(left.argmax(1, keepdim=True))
        own = chosen[-1].unsqueeze(2)  # [B, 1, 1]
        row = similarity.gather(1, own.expand(-1, -1, length)).squeeze(1)
        row = row * relevance * relevance.gather(1, chosen[-1])
        before = factor[:, :t]
        row = row - (before * before.gather(2, own.expand(-1, t, -1))).sum(1)
        pivot = left.gather(1, chosen[-1])
        factor[:, t] = torch.where(pivot > 0, row / pivot.sqrt(), 0)
        left = (left - factor[:, t].square()).scatter_(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, 1)
