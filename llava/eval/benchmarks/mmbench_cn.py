"""MMBench dev in Chinese: as mmbench, asked and answered in Chinese.

LLaVA's script looks for the TSV in `mmbench_cn`, its documentation puts it into `mmbench`: both will do.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llava.eval.benchmarks import base, mmbench
from llava.eval.questions import Sample

FILE = "mmbench_dev_cn_20231003.tsv"
SUFFIX = "\n请直接回答选项字母。"


def table(root: Path) -> Path:
    beside_english = root / "mmbench" / FILE
    return beside_english if beside_english.exists() else root / "mmbench_cn" / FILE


def load(root: Path, questions: Path | None = None) -> list[Sample]:
    return mmbench.load(root, questions or table(root))


def write(out: Path, root: Path, answers: Mapping[str, str]) -> None:
    mmbench.write(out, root, answers, table(root))


BENCHMARK = replace(
    mmbench.BENCHMARK,
    name="mmbench_cn",
    title="MMBench-CN dev",
    version="dev 20231003",
    questions=4_329,  # 1,164 in their rotations
    files=(base.DataFile(f"mmbench_cn/{FILE}", 4_329, f"{mmbench.SOURCE}/{FILE}", "ask, score, submit"),),
    load=load,
    prompt=lambda sample, protocol="": sample.text + SUFFIX,
    write=write,
    published=(58.3, 58.9, 58.08, 17.70, 63.6),
)
