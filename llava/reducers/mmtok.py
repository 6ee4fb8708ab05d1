"""MMTok (ICLR 2026): patches that together cover the question's words and all other patches."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import cosine, cover
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
        length = features.patches.shape[1]
        patches = cosine(features.patches).div_(self.vv).softmax(1) * (self.alpha / length)
        covers = torch.cat([patches, self._words(features)], 2)
        return pick(features.patches, cover(covers, min(self.tokens, length)).sort(1).values)

    @torch.no_grad()
    def _words(self, features: VisionFeatures) -> Tensor:
        """[B, N, words] how well each patch covers each word, divided by the number of words, then zeros."""
        projected = F.normalize(features.projected.float(), dim=2, eps=1e-8)
        each = [
            (image @ F.normalize(words.float(), dim=1, eps=1e-8).T / self.tv).softmax(0) / len(words)
            for image, words in zip(projected, features.text_tokens, strict=True)
        ]
        # Sums over words and patches go in strides of up to 64 and must not change with the longest question
        # of a batch: zeros fill up to whole strides.
        length = projected.shape[1]
        widest = max((words.shape[1] for words in each), default=0)
        widest += -(length + widest) % 64
        out = projected.new_zeros(len(each), length, widest)
        for row, words in zip(out, each, strict=True):
            row[:, : words.shape[1]] = words
        return out
