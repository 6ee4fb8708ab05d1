"""`llava mini benchmarks`: small sets of the paper's six benchmarks, in their official file formats.

The pictures are composed test scenes (drawings, backgrounds and pairs that no train scene shows; world.py),
the questions those a small model can know. Folder and file names are the official ones, so that `llava eval`,
`llava score` and `llava submit` work with `--root OUT` as they do with the real sets. The numbers say nothing
about the real benchmarks: never put them beside published ones. OUT/objects.jsonl says what each picture
shows, OUT/mini.json what the best constant answer scores.

Per benchmark `--n` pictures (MME: per subtask):
  pope        18 questions a picture: 3 present and 3 absent classes in each category. Absent ones are drawn
              anywhere (random), from the most frequent (popular), or from those most often seen with the
              present ones (adversarial), as POPE does
  mme         existence, count, position, color, OCR: one yes and one no a picture; other subtasks are absent
  textvqa     what the rendered word says, with no OCR tokens in the prompt
  vqav2       up to three questions a picture, ten equal reference answers, with an annotations file
  scienceqa   one multiple-choice question a picture, and a third as many without picture
  mmbench     one multiple-choice question a picture in four rotations
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.errors import UserError
from llava.eval.benchmarks import mmbench, mme, pope, scienceqa, textvqa, vqav2
from llava.eval.reading import jsonl
from llava.files import write_text
from llava.mini import world
from llava.mini.formats import (
    APART,
    SUBTASKS,
    Source,
    write_mmbench,
    write_mme,
    write_pope,
    write_scienceqa,
    write_textvqa,
    write_vqav2,
)
from llava.mini.questions import LETTERS

VERSION = 1

WRITERS: dict[str, Callable[[Source, int], None]] = {
    "pope": write_pope,
    "mme": write_mme,
    "textvqa": write_textvqa,
    "vqav2": write_vqav2,
    "scienceqa": write_scienceqa,
    "mmbench": write_mmbench,
}


def blind_scores(root: Path) -> dict[str, dict]:
    """{benchmark: {"answer", "score"}}: the headline of the constant answer that gets most."""
    words = [sample.reference[0] for sample in textvqa.load(root)]
    answers = {
        **dict.fromkeys(("pope", "mme", "vqav2"), ("Yes", "No")),
        **dict.fromkeys(("scienceqa", "mmbench"), tuple(LETTERS)),
        "textvqa": (Counter(words).most_common(1)[0][0],),
    }
    best = {}
    for benchmark in (module.BENCHMARK for module in (pope, mme, textvqa, vqav2, scienceqa, mmbench)):
        samples = benchmark.load(root)
        tried = [
            (benchmark.score(samples, [answer] * len(samples))["metrics"][benchmark.headline], answer)
            for answer in answers[benchmark.name]
        ]
        score, answer = max(tried, key=lambda pair: -1.0 if pair[0] is None else pair[0])
        best[benchmark.name] = {"answer": answer, "score": score, "questions": len(samples)}
    return best


def generate(out: Path, seed: int, number: int) -> dict:
    """Write all six sets into `out`, whole or not at all, and return the manifest; an equal set is kept."""
    wanted: dict[str, Any] = {"version": VERSION, "world": world.VERSION, "seed": seed, "n": number}
    manifest = out / "mini.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return found
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds other data: choose another --out or remove it.")
    beside = out.with_name(f"{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    pictures, shown = number * (len(WRITERS) - 1 + len(SUBTASKS)), dict[str, world.Scene]()
    with tqdm(total=pictures, desc="mini benchmarks", unit="picture", file=sys.stderr, mininterval=1) as bar:
        for place, write in enumerate(WRITERS.values()):
            write(Source(beside, seed, (place + 1) * APART, shown, bar), number)
    write_text(
        beside / "objects.jsonl", jsonl(world.describe(scene, image) for image, scene in shown.items())
    )
    wanted["blind"] = blind_scores(beside)
    write_text(beside / manifest.name, json.dumps(wanted, indent=1) + "\n")
    if out.exists():
        out.rmdir()
    os.replace(beside, out)
    return wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("playground/data/eval-mini"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=50, help="pictures a benchmark (MME: a subtask; default 50)")


def run(args: argparse.Namespace) -> int:
    if args.n < 1 or args.seed < 0:
        raise UserError("--n must be at least 1 and --seed at least 0.")
    made = generate(args.out, args.seed, args.n)
    print(f"{args.out}, seed {made['seed']}")
    print(f"{'benchmark':<10} {'questions':>9}  best constant answer")
    for name, row in made["blind"].items():
        print(f"{name:<10} {row['questions']:>9}  {row['answer']}: {row['score']:.1f}")
    return 0
