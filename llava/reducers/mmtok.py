"""MMTok (ICLR 2026): patches that together cover the question's words and all other patches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import cosine, cover, unit
from llava.reducers.ops import pick
from llava.reducers.registry import Reducer, option, register


@register("mmtok")
@dataclass(frozen=True)
class MMTok(Reducer):
    """Greedy coverage of the words (cosine after the projector) and of the patches (before it), raster order.

    Every patch may be chosen: the release leaves out those in the border that padding to a square adds, which
    a reducer cannot see.

    Attributes:
        tokens: how many (all N where there are fewer).
        alpha: weight of covering patches beside covering words.
        tv: temperature of the softmax that shares out a word over the patches.
        vv: that of a patch.
    """

    reads = ("projected", "text_tokens")

    tokens: int = option(64, low=1)
    alpha: float = option(0.5, low=0)
    tv: float = option(0.02, low=0, open_low=True)
    vv: float = option(0.2, low=0, open_low=True)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        chosen = cover(self._covers(features), min(self.tokens, features.patches.shape[1]))
        return pick(features.patches, chosen.sort(1).values)

    @torch.no_grad()
    def _covers(self, features: VisionFeatures) -> Tensor:
        """[B, N, N + words] how well each patch covers each patch and each word of the question."""
        batch, length, _ = features.patches.shape
        norms = torch.linalg.vector_norm(features.projected, dim=2, dtype=torch.float32).clamp(min=1e-12)
        words = [  # [N, words] each, the softmax over patches
            (image.float() @ unit(text).T / norm.unsqueeze(1) / self.tv).softmax(0) / len(text)
            for image, norm, text in zip(features.projected, norms, features.text_tokens, strict=True)
        ]
        # A sum over patches and words goes in strides of up to 64 numbers and must not change with the
        # longest question of a batch: zeros fill up to whole strides.
        width = length + max((each.shape[1] for each in words), default=0)
        out = torch.zeros(batch, length, width + -width % 64, device=features.patches.device)
        # The same for patches: exp(cos / vv) / sum of its column; cosines are symmetric and at most 1.
        patches = cosine(features.patches).sub_(1).div_(self.vv).exp_()
        torch.mul(patches, self.alpha / length / patches.sum(1, keepdim=True), out=out[:, :, :length])
        for image, each in zip(out, words, strict=True):
            image[:, length : length + each.shape[1]] = each
        return out
