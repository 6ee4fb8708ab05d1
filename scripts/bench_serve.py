"""Questions per second of a running server, for each reducer: the table of docs/serving.md.

    llava serve --model-path checkpoints/mini-lora --port 8000
    python scripts/bench_serve.py --model checkpoints/mini-lora --url http://localhost:8000/v1

Asks the mini-POPE (18 yes-no questions about each of `--pictures` composed scenes), `--concurrency` at once.
The first answer about a picture pays for tower, reducer and prefill; the server's caches serve the others, as
they do when a real benchmark is asked.
Needs the openai package, and `--trust-request-mm-kwargs` where the server was not started by `llava serve`.
"""

import argparse
import asyncio
import base64
import json
import statistics
import tempfile
import time
from pathlib import Path

from openai import AsyncOpenAI

from llava.mini.benchmarks import generate

REDUCERS = ("none", "prumerge+(max_tokens=144)", "prumerge")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--reducers", nargs="+", default=REDUCERS, metavar="SPEC")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument(
        "--seed", type=int, default=0, help="other pictures: the caches know none of them yet"
    )
    parser.add_argument("--max-new-tokens", type=int, default=4)
    return parser


async def measure(
    args: argparse.Namespace, questions: list[tuple[str, str]], reducer: str
) -> dict[str, float]:
    """Ask all (data URL, text) questions; rates and times in seconds."""
    gate = asyncio.Semaphore(args.concurrency)
    async with AsyncOpenAI(base_url=args.url, api_key=args.api_key, timeout=3600) as client:

        async def ask(url: str, text: str) -> tuple[float, int]:
            async with gate:
                start = time.perf_counter()
                parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
                reply = await client.chat.completions.create(
                    model=args.model,
                    messages=[{"role": "user", "content": parts}],
                    temperature=0,
                    max_tokens=args.max_new_tokens,
                    extra_body={"mm_processor_kwargs": {"reducer": reducer}},
                )
                return time.perf_counter() - start, reply.usage.prompt_tokens

        start = time.perf_counter()
        done = await asyncio.gather(*(ask(*question) for question in questions))
    seconds = time.perf_counter() - start
    times = sorted(took for took, _ in done)
    return {
        "prompt": statistics.mean(tokens for _, tokens in done),
        "rate": len(done) / seconds,
        "p50": times[len(times) // 2],
        "p95": times[int(0.95 * (len(times) - 1))],
    }


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "mini"
        generate(root, seed=args.seed, number=args.pictures)
        lines = (root / "pope/llava_pope_test.jsonl").read_text(encoding="utf-8").splitlines()
        questions = []
        for one in map(json.loads, lines):
            data = base64.b64encode((root / "pope/val2014" / one["image"]).read_bytes()).decode()
            questions.append((f"data:image/jpeg;base64,{data}", one["text"]))
    print(f"{len(questions)} questions about {args.pictures} pictures, {args.concurrency} at a time")
    print("| reducer | prompt tokens, mean | questions/s | p50 s | p95 s |\n|---|---|---|---|---|")
    for reducer in args.reducers:
        found = asyncio.run(measure(args, questions, reducer))
        cells = [f"{found['prompt']:.1f}", *(f"{found[name]:.2f}" for name in ("rate", "p50", "p95"))]
        print(f"| {reducer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
