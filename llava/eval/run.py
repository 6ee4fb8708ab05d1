"""`llava eval BENCHMARK --model-path ...`: ask a benchmark's questions, write the answers file, score it.

`--endpoint URL` in place of --model-path asks a server, `--concurrency N` questions at a time
(docs/serving.md).

The same command continues a run that was killed. One process per visible GPU by default, `--workers N` of
them, or those of torchrun and accelerate share the work. `--num-chunks N --chunk-idx I` asks one of N
contiguous parts instead, as LLaVA's scripts do, each with its own answers file.

Exit status 0: every question is answered (and scored, where that is done here); 1: some are not, named in the
output and in the provenance file; 2: bad input, or an answers file that belongs to another run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import read_answers
from llava.eval.benchmarks.base import Benchmark, MissingFile, Protocol, Sample
from llava.eval.doctor import as_lines, examine
from llava.eval.provenance import Files
from llava.eval.score import as_text, report_problems
from llava.eval.score import score as score_answers

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from llava.engine import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(benchmarks.BENCHMARKS))
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model-path", help="checkpoint: directory or hub name")
    which.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server: http://host:8000/v1")
    model.add_argument("--model", metavar="NAME", help="as the server calls it (default: its only one)")
    model.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    model.add_argument("--reducer", help="token reducer in place of the checkpoint's, e.g. prumerge+")
    model.add_argument("--vision-tower", help="vision tower in place of the checkpoint's")
    model.add_argument(
        "--anyres", choices=("tile", "shared", "papers"), help="what a number of tokens means for tiles"
    )
    model.add_argument("--conv-mode", help="prompt template (default: vicuna_v1, for the mini model smollm2)")
    model.add_argument("--dtype", help="float16, bfloat16, float32 (default: what the device is best at)")
    model.add_argument("--attention", help="sdpa, eager, flash_attention_2 (default: likewise)")
    model.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")
    model.add_argument("--load-8bit", action="store_true")
    model.add_argument("--load-4bit", action="store_true")
    data = parser.add_argument_group("questions and answers")
    data.add_argument("--root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s")
    data.add_argument("--questions", type=Path, help="question file in place of the benchmark's own")
    data.add_argument("--protocol", help="way of asking; textvqa: ocr, no-ocr; scienceqa: pad, crop")
    data.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    data.add_argument(
        "--answers", type=Path, help="answers file (default: ROOT/.../answers/MODEL-REDUCER-PROTOCOL.jsonl)"
    )
    data.add_argument("--overwrite", action="store_true", help="begin anew where the answers file exists")
    data.add_argument("--no-score", action="store_true", help="answer only")
    how = parser.add_argument_group("how")
    how.add_argument("--max-new-tokens", type=int, help="default: 128, or 1024 where LLaVA uses that")
    how.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    how.add_argument("--top-p", type=float)
    how.add_argument("--num-beams", type=int, default=1)
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--batch-tokens", type=int, metavar="N", help="bound of a batch; halved when memory runs out"
    )
    how.add_argument("--decode-workers", type=int, metavar="N", help="processes that decode images ahead")
    how.add_argument("--workers", type=int, metavar="N", help="processes (default: one per visible GPU)")
    how.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="questions at a time, of a server"
    )
    how.add_argument("--num-chunks", type=int, default=1, metavar="N")
    how.add_argument("--chunk-idx", type=int, default=0, metavar="I")


def run(args: argparse.Namespace) -> int:
    benchmark = benchmarks.get(args.benchmark)
    protocol = protocol_of(benchmark, args.protocol)

    from llava.engine.source import source_of
    from llava.eval.loop import Job, answer

    source = source_of(args)
    if args.endpoint and protocol.image_aspect_ratio:
        raise UserError(f"--protocol {protocol.name} changes images, which --endpoint sends as they are.")
    answers = args.answers or default_answers(benchmark, protocol, source.name, args)
    try:
        samples: Sequence[Sample] = benchmark.load(args.root, args.questions)[: args.limit]
        if not answers.exists():  # before the model is loaded
            refuse_if_no_image_is_there([sample.image for sample in samples])
    except MissingFile:
        print(
            "\n".join(as_lines(benchmark, [examine(file, args.root) for file in benchmark.files])),
            file=sys.stderr,
        )
        raise
    about = {"benchmark": benchmark.name, "version": benchmark.version, "protocol": protocol.name}
    if args.num_chunks > 1:
        samples = chunk(samples, args.num_chunks, args.chunk_idx)
        about["chunk"] = f"{args.chunk_idx} of {args.num_chunks}"

    requests, lines = requests_of(
        benchmark,
        samples,
        protocol,
        max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        seed=args.seed,
        reducer=args.reducer if args.endpoint else None,  # a model of this process is loaded with its own
    )
    job = Job(
        requests=requests,
        lines=lines,
        model=source,
        answers=answers,
        about=about,
        image_aspect_ratio=protocol.image_aspect_ratio,
        batch_tokens=args.batch_tokens,
        decode_workers=default_decode_workers() if args.decode_workers is None else args.decode_workers,
    )
    took = answer(job, workers=args.workers, overwrite=args.overwrite)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    scored = args.num_chunks == 1 and args.questions is None and not args.no_score
    return finish(benchmark, args.root, answers, took, score=scored, limit=args.limit)


def protocol_of(benchmark: Benchmark, name: str | None) -> Protocol:
    """The first is the default."""
    for protocol in benchmark.protocols:
        if name in (None, protocol.name):
            return protocol
    known = "; ".join(f"{protocol.name}: {protocol.note}" for protocol in benchmark.protocols)
    raise UserError(f"{benchmark.name} has no protocol {name!r}. {known}.")


def requests_of(
    benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol, **how: Any
) -> tuple[list["Request"], list[dict[str, Any]]]:
    """What to ask for each sample, and what its line in the answers file holds; `how`: a Request's fields."""
    from llava.engine import Request

    requests, lines = [], []
    for index, sample in enumerate(samples):
        asked = benchmark.prompt(sample, protocol.name)
        requests.append(Request(id=index, **with_image(asked, sample.image), **how))
        line: dict[str, Any] = {
            "question_id": sample.id,
            "prompt": benchmark.recorded(sample, asked),
            "text": "",
        }
        if sample.options:
            letters = [chr(ord("A") + number) for number in range(len(sample.options))]
            line = {"question_id": sample.id, "round_id": 0, **line}
            line |= {"options": list(sample.options), "option_char": letters}
        lines.append(line)
    return requests, lines


def with_image(text: str, image: Path | str | None) -> dict[str, Any]:
    """`text` and `images` of a Request. The image tag is put in here, so that a second one is a problem."""
    return {"text": f"<image>\n{text}", "images": (image,)} if image else {"text": text}


def refuse_if_no_image_is_there(images: Sequence[Any]) -> None:
    """One missing image is a problem of its questions; a missing folder is a mistake of the command."""
    files = {image for image in images if isinstance(image, Path)}
    if files and not any(file.exists() for file in files):
        raise MissingFile(f"none of the {len(files):,} images is there; the first would be {min(files)}.")


def chunk(items: Sequence[Any], chunks: int, index: int) -> Sequence[Any]:
    """Part `index` of `chunks` contiguous parts of ceil(n / chunks); empty where no item is left for it."""
    if not 0 <= index < chunks:
        raise UserError(f"--chunk-idx {index} is not one of 0 to {chunks - 1} (--num-chunks {chunks}).")
    size = -(-len(items) // chunks)
    return items[index * size : (index + 1) * size]


def default_answers(benchmark: Benchmark, protocol: Protocol, model: str, args: argparse.Namespace) -> Path:
    """<root>/<folder>/answers/<model>[@<host>-<port>][-<reducer>][-<protocol>].jsonl, of chunks
    .../<chunks>_<index>.jsonl. The address: a server's answers are another run than those of a model here."""
    server = urlsplit(args.endpoint or "").netloc.rpartition("@")[2].replace(":", "-")
    parts = [f"{model}@{server}" if server else model]
    parts += [args.reducer] if args.reducer else []
    parts += [protocol.name] if protocol is not benchmark.protocols[0] else []
    name = "-".join(parts).replace("/", "_")
    folder = args.root / benchmark.files[0].path.split("/")[0] / "answers"
    if args.num_chunks > 1:
        return folder / name / f"{args.num_chunks}_{args.chunk_idx}.jsonl"
    return folder / f"{name}.jsonl"


def default_decode_workers() -> int:
    return max(1, min(4, (os.cpu_count() or 1) - 1))


def finish(
    benchmark: Benchmark, root: Path, answers: Path, took: dict[str, Any], *, score: bool, limit: int | None
) -> int:
    """Print what came of it, keep the score beside the answers."""
    failed = tell(answers, took)
    if not score or benchmark.measure is None or benchmark.read is not read_answers:
        if benchmark.write is not None and limit is None:
            print(f"  next: llava submit {benchmark.name} --root {root} --answers {answers} --out FILE")
        return failed
    try:
        report = score_answers(benchmark, root, [answers], limit=limit)
    except UserError as error:
        print(f"  not scored: {error}")
        return failed
    kept = ("headline", "metrics", "expected", "notes", "partial")
    Files(answers).update(score={name: report[name] for name in kept if name in report})
    print(as_text(benchmark, report))
    return 0 if report["headline"] else 1


def tell(answers: Path, took: dict[str, Any]) -> int:
    """Print what a run took and what is left without an answer; 1 if anything is."""
    print(f"{answers}: {took['answered']:,} of {took['questions']:,} questions answered")
    if tokens := took["visual_tokens"]:
        print(f"  {tokens['mean']:.1f} visual tokens an image (p95 {tokens['p95']:.0f})")
    if took["device_seconds"]:
        print(f"  {took['questions_per_second']:.2f} questions/s, {took['device_seconds']:.0f} s of work")
    report_problems([f"question {one['question_id']}: {one['problem']}" for one in took["problems"]])
    return 1 if took["problems"] else 0
