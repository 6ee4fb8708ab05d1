"""MMBench dev in Chinese: as mmbench, asked and answered in Chinese. Published: LLaVA-1.5-7B 58.3.

LLaVA's script looks for the TSV in `mmbench_cn`, its documentation puts it into `mmbench`: both will do.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava.eval.benchmarks import mmbench
from llava.eval.benchmarks.base import DataFile, Sample

FILE = "mmbench_dev_cn_20231003.tsv"
SUFFIX = "\n请直接回答选项字母。"


def table(root: Path) -> Path:
    beside_english = root / "mmbench" / FILE
    return beside_english if beside_english.exists() else root / "mmbench_cn" / FILE


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    return mmbench.load(root, questions or table(root))


def write(out: Path, root: Path, answers: Mapping[str, str]) -> None:
    mmbench.write_sheet(out, table(root), answers)


BENCHMARK = replace(
    mmbench.BENCHMARK,
    name="mmbench_cn",
    title="MMBench-CN dev",
    version="dev 20231003",
    questions=4_329,  # 1,164 in their rotations
    files=(DataFile(f"mmbench_cn/{FILE}", 4_329, f"{mmbench.OPENMMLAB}/{FILE}", "ask, score, submit"),),
    load=load,
    prompt=partial(mmbench.prompt, suffix=SUFFIX),
    write=write,
)
