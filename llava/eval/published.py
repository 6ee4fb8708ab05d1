"""Scores others published, to stand beside one's own. Sources: the LLaVA-1.5 paper and model zoo, the
PruMerge paper.

The runs differ in ways that matter: LLaVA's ScienceQA figures were made without padding (69.5 with),
PruMerge's rows are LoRA-tuned with their reducer, and libraries move results by up to 0.4 points (MME about
5).
"""

from dataclasses import dataclass

COLUMNS = (
    *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seed"),
    *("llava-bench", "mm-vet"),
)


@dataclass(frozen=True)
class Published:
    name: str
    visual_tokens: float | None  # a picture, where it is a number
    scores: dict[str, float]


def _row(name: str, visual_tokens: float | None, *values: float | None) -> Published:
    return Published(
        name, visual_tokens, {k: v for k, v in zip(COLUMNS, values, strict=False) if v is not None}
    )


def _six(name: str, tokens: float | None, vqav2, sqa, textvqa, pope, mme, mmbench) -> Published:
    """PruMerge reports six benchmarks."""
    return _row(name, tokens, vqav2, None, None, sqa, textvqa, pope, mme, mmbench)


PUBLISHED = (
    _row("LLaVA-1.5-7B", 576, 78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
    _row("LLaVA-1.5-7B LoRA", 576, 79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2),
    _row(
        "LLaVA-1.5-7B, a third party's rerun of the present code",
        576,
        *(78.52, 61.94, 50.06, 69.51, 58.21, 85.87, 1506.5, 64.69, 58.08, None, None, 31.3),
    ),
    _row(
        "LLaVA-1.5-7B that sees nothing (third party)",
        0,
        *(40.73, 37.38, 45.36, 63.06, 41.43, 47.21, 719.1, 20.02, 17.70, None, None, 11.3),
    ),
    _row("LLaVA-1.5-13B", 576, 80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
    _six("PruMerge 7B", 32, 72.0, 68.5, 56.0, 76.3, 1350.3, 60.9),
    _six("PruMerge+ 7B", 144, 76.5, 68.3, 57.1, 84.0, 1462.4, 64.9),
    _six("PruMerge 13B", 32, 72.8, 71.0, 58.4, 78.5, 1428.2, 62.3),
    _six("PruMerge+ 13B", 144, 77.8, 71.0, 58.6, 84.4, 1485.5, 65.7),
)
