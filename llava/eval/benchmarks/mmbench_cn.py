"""MMBench dev in Chinese: as mmbench, asked and answered in Chinese. Published: LLaVA-1.5-7B 58.3."""

from dataclasses import replace
from functools import partial

from llava.eval.benchmarks import mmbench
from llava.eval.benchmarks.base import DataFile

CN = "mmbench_cn/mmbench_dev_cn_20231003.tsv"
SUFFIX = "\n请直接回答选项字母。"

BENCHMARK = replace(
    mmbench.BENCHMARK,
    name="mmbench_cn",
    title="MMBench-CN dev",
    version="dev 20231003",
    files=(DataFile(CN, None, f"{mmbench.OPENMMLAB}/mmbench_dev_cn_20231003.tsv", "ask, score, submit"),),
    load=partial(mmbench.load, default=CN),
    prompt=partial(mmbench.prompt, suffix=SUFFIX),
    write=partial(mmbench.write, default=CN),
)
