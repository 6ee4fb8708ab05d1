"""Questions per second of a running server, for each reducer: the table of docs/serving.md.

    llava serve --model-path checkpoints/mini-lora --port 8000
    python scripts/bench_serve.py --url http://localhost:8000/v1

Asks the mini-POPE (18 yes-no questions about each of `--pictures` composed scenes), `--concurrency` at once.
The first answer about a picture pays for tower, reducer and prefill; the server's caches serve the others, as
they do when a real benchmark is asked. With another `--seed` the pictures are new to the caches.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from llava.engine import EndpointEngine, Request
from llava.mini.benchmarks import generate

REDUCERS = ("none", "prumerge+(max_tokens=144)", "prumerge")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="as the server calls it (default: its only one)")
    parser.add_argument("--reducers", nargs="+", default=REDUCERS, metavar="SPEC")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    return parser


def main() -> None:
    args = parser().parse_args()
    engine = EndpointEngine(args.url, args.model, concurrency=args.concurrency)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mini"
        generate(root, seed=args.seed, number=args.pictures)
        lines = (root / "pope/llava_pope_test.jsonl").read_text(encoding="utf-8").splitlines()
        print(f"{len(lines)} questions about {args.pictures} pictures, {args.concurrency} at a time")
        print("| reducer | visual tokens, mean | questions/s |\n|---|---|---|")
        for reducer in args.reducers:
            requests = [
                Request(
                    text=one["text"],
                    images=[root / "pope/val2014" / one["image"]],
                    max_new_tokens=args.max_new_tokens,
                    reducer=reducer,
                )
                for one in map(json.loads, lines)
            ]
            start = time.perf_counter()
            answers = list(engine.answer(requests))
            seconds = time.perf_counter() - start
            if problem := next((one.problem for one in answers if one.problem), None):
                raise SystemExit(f"{reducer}: {problem}")
            tokens = statistics.mean(count for one in answers for count in one.visual_tokens)
            print(f"| {reducer} | {tokens:.1f} | {len(answers) / seconds:.2f} |")


if __name__ == "__main__":
    main()
