"""Questions per second of a running server, and of the same model in this process: the table of
docs/serving.md.

    llava serve --model-path checkpoints/mini-lora --port 8000
    python scripts/bench_serve.py --url http://localhost:8000/v1 --model-path checkpoints/mini-lora

Asks the mini-POPE (18 yes-no questions about each of `--pictures` scenes), the server `--concurrency`
questions at a time. The first answer about a picture pays for tower, reducer and prefill; caches serve the
others, as they do when a real benchmark is asked. The two take turns by reducer, with new pictures in
each of `--rounds`, so that whatever else the machine does meets both alike. Processor time is that of all
their processes; of a server elsewhere only this one's is seen.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from llava.engine import EndpointEngine, Engine, ModelSource, Request
from llava.mini.benchmarks import generate

REDUCERS = ("none", "prumerge+(max_tokens=144)", "prumerge")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="as the server calls it (default: its only one)")
    parser.add_argument("--model-path", help="the checkpoint, to be asked in this process too")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument("--dtype", help="of the model in this process; give the server the same")
    parser.add_argument("--reducers", nargs="+", default=REDUCERS, metavar="SPEC")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    return parser


def main() -> None:
    args = parser().parse_args()
    here = psutil.Process()
    engines: dict[str, tuple[Engine, list[psutil.Process]]] = {
        "served": (
            EndpointEngine(args.url, args.model, concurrency=args.concurrency),
            [here, *processes_of(args.url)],
        )
    }
    if args.model_path:
        source = ModelSource(args.model_path, args.model_base, dtype=args.dtype)
        engines["here"] = source.load(), [here]
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    tokens: dict[str, list[int]] = {}
    for seed in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), seed=seed, number=args.pictures)
            for reducer in args.reducers:
                requests = requests_of(Path(folder), reducer, args.max_new_tokens)
                for name, (engine, processes) in engines.items():
                    before, start = processor_seconds(processes), time.perf_counter()
                    answers = list(engine.answer(requests))
                    took = time.perf_counter() - start, processor_seconds(processes) - before
                    if problem := next((one.problem for one in answers if one.problem), None):
                        raise SystemExit(f"{name}, {reducer}: {problem}")
                    taken.setdefault((name, reducer), []).append(took)
                    tokens.setdefault(reducer, []).extend(n for one in answers for n in one.visual_tokens)

    asked = 18 * args.pictures
    print(f"{asked} questions about {args.pictures} pictures, {args.rounds} rounds, medians")
    print("| reducer | visual tokens |" + "".join(f" {n}: questions/s | processor ms |" for n in engines))
    print("|---" * (2 + 2 * len(engines)) + "|")
    for reducer in args.reducers:
        row = [reducer, f"{statistics.mean(tokens[reducer]):.1f}"]
        for name in engines:
            seconds, processor = map(statistics.median, zip(*taken[name, reducer], strict=True))
            row += [f"{asked / seconds:.2f}", f"{1000 * processor / asked:.0f}"]
        print("| " + " | ".join(row) + " |")


def requests_of(root: Path, reducer: str, max_new_tokens: int) -> list[Request]:
    lines = (root / "pope/llava_pope_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Request(
            text=one["text"],
            images=[root / "pope/val2014" / one["image"]],
            max_new_tokens=max_new_tokens,
            reducer=reducer,
        )
        for one in map(json.loads, lines)
    ]


def processes_of(url: str) -> list[psutil.Process]:
    """Those of a server on this machine; none of one elsewhere."""
    port = urlsplit(url).port
    listening = {one.pid for one in psutil.net_connections("tcp") if one.laddr.port == port and not one.raddr}
    owners = [psutil.Process(pid) for pid in listening if pid]
    return [one for owner in owners for one in (owner, *owner.children(recursive=True))]


def processor_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    main()
