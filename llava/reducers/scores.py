"""How much each patch counts: the attention of CLS, or what takes its place in towers without a CLS token.

Ours, not the paper's: PruMerge and its kin read the attention of the CLS token, and SigLIP has none.
"""

from torch import Tensor

from llava.reducers.features import VisionFeatures
from llava.reducers.registry import ReducerInputError

SCORES = {
    "cls": "query",
    "probe": "probe_attention",
    "mean": "mean_query",
}
"""What a patch's score is, best first, and the field of VisionFeatures it is read from.

- cls: the attention of the CLS row in the tower's last block.
- probe: the attention of the pooling head's probe (SigLIP), mean over its heads.
- mean: the attention of the patches' mean query, in the place of CLS's.
"""


def score_reads(score: str | None) -> tuple[str, ...]:
    """The optional fields of VisionFeatures that `patch_scores` reads for this score."""
    return tuple(field for name, field in SCORES.items() if score in (None, name) and name != "cls")


def patch_scores(features: VisionFeatures, score: str | None = None, *, heads: int = 1) -> Tensor:
    """[B, N] float32, the same bits for an image whatever batch it comes in.

    `cls` and `mean` are softmax(q . k / sqrt(C / heads)), mean over heads, over all rows of `key`, of which
    CLS is then dropped: so a row sums to 1 or less, and is not renormalised.

    Args:
        score: a key of SCORES; None: the first that the tower has.
        heads: 1 for PruMerge, which takes all channels as one wide head; the tower's own for others.

    Raises:
        ReducerInputError: the tower, or who called it, did not give what the score is read from.
    """
    given = [name for name, field in SCORES.items() if getattr(features, field) is not None]
    if (score or next(iter(given), None)) not in given:
        raise ReducerInputError(
            f"this vision tower gives no {score or 'CLS attention'} to score patches by: use "
            f"{' or '.join(f'score={name}' for name in given) or 'pool, grid or random'}"
        )
    score = score or given[0]
    if score == "probe":
        return features.probe_attention.float()
    query = features.query if score == "cls" else features.mean_query
    batch, rows, width = features.key.shape
    key = features.key.float().view(batch, rows, heads, width // heads)
    # Products and sums rather than a matrix product, whose last bits depend on the batch.
    logits = (key * (query.float() * (width // heads) ** -0.5).view(batch, 1, heads, width // heads)).sum(3)
    attention = logits.softmax(1).mean(2)
    return attention[:, 1:] if features.has_cls else attention
