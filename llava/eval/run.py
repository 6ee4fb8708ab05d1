"""`llava eval BENCHMARK --model-path ...`: ask a benchmark's questions, write the answers file, score it.

The same command continues a run that was killed. Several processes share the work: one per visible GPU by
default, `--workers N` of them, or those of torchrun and accelerate. `--num-chunks N --chunk-idx I` asks one
of N contiguous parts instead, as LLaVA's scripts do, each with its own answers file.

Exit status 0: every question is answered (and scored, where that is done here); 1: some are not, named in the
output and in the provenance file; 2: bad input, or an answers file that belongs to another run.
"""

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava import hardware
from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import read_answers
from llava.eval.benchmarks.base import Benchmark, MissingFile, Protocol, Sample
from llava.eval.doctor import as_lines, examine_all

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from llava.eval.predict import Generation, Request


@dataclass(frozen=True)
class ModelSource:
    """How a model is loaded: `load_pretrained_model`'s arguments."""

    path: str
    base: str | None = None
    reducer: str | None = None
    vision_tower: str | None = None
    dtype: str | None = None
    attention: str | None = None
    device: str = "cuda"
    load_8bit: bool = False
    load_4bit: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Job:
    """Everything one process needs to take part in a run. It is sent to worker processes as it is."""

    requests: Sequence["Request"]
    model: ModelSource
    answers: Path
    generation: "Generation"
    conv_mode: str | None = None  # None: the model's own
    image_aspect_ratio: str | None = None  # None: the checkpoint's
    about: tuple[tuple[str, Any], ...] = ()  # what else makes the run what it is: benchmark, protocol, chunk
    batch_tokens: int | None = None
    decode_workers: int = 1
    processes: int = 1  # that are known to share the work
    show_progress: bool = True


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(benchmarks.BENCHMARKS))
    model = parser.add_argument_group("model")
    model.add_argument("--model-path", required=True, help="checkpoint: directory or hub name")
    model.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    model.add_argument("--reducer", help="token reducer in place of the checkpoint's, e.g. prumerge+")
    model.add_argument("--vision-tower", help="vision tower in place of the checkpoint's")
    model.add_argument("--conv-mode", help="prompt template (default: vicuna_v1, for the mini model smollm2)")
    model.add_argument("--dtype", help="float16, bfloat16, float32 (default: what the device is best at)")
    model.add_argument("--attention", help="sdpa, eager, flash_attention_2 (default: likewise)")
    model.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")
    model.add_argument("--load-8bit", action="store_true")
    model.add_argument("--load-4bit", action="store_true")
    model.add_argument("--packed", action="store_true", help="on a CPU: faster, for twice the memory")
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
    how.add_argument("--num-chunks", type=int, default=1, metavar="N")
    how.add_argument("--chunk-idx", type=int, default=0, metavar="I")


def run(args: argparse.Namespace) -> int:
    from llava.eval.predict import Generation, refuse_if_no_image_is_there

    benchmark = benchmarks.get(args.benchmark)
    protocol = protocol_of(benchmark, args.protocol)
    answers = args.answers or default_answers(benchmark, protocol, args)
    try:
        samples = benchmark.load(args.root, args.questions)[: args.limit]
        requests = requests_of(benchmark, samples, protocol)
        if not answers.exists():  # before the model is loaded
            refuse_if_no_image_is_there(requests)
    except MissingFile:
        print("\n".join(as_lines(benchmark, examine_all(benchmark, args.root))), file=sys.stderr)
        raise
    about = {"benchmark": benchmark.name, "version": benchmark.version, "protocol": protocol.name}
    if args.num_chunks > 1:
        requests = chunk(requests, args.num_chunks, args.chunk_idx)
        about["chunk"] = f"{args.chunk_idx} of {args.num_chunks}"
    job = Job(
        requests=requests,
        model=ModelSource(
            path=args.model_path,
            base=args.model_base,
            reducer=args.reducer,
            vision_tower=args.vision_tower,
            dtype=args.dtype,
            attention=args.attention,
            device=args.device,
            load_8bit=args.load_8bit,
            load_4bit=args.load_4bit,
            packed=args.packed,
        ),
        answers=answers,
        generation=Generation(
            max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            num_beams=args.num_beams,
            seed=args.seed,
        ),
        conv_mode=args.conv_mode,
        image_aspect_ratio=protocol.image_aspect_ratio,
        about=tuple(about.items()),
        batch_tokens=args.batch_tokens,
        decode_workers=default_decode_workers() if args.decode_workers is None else args.decode_workers,
    )
    took = answer(job, workers=args.workers, overwrite=args.overwrite)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    whole = args.limit is None and args.num_chunks == 1 and args.questions is None
    return finish(benchmark, args.root, answers, took, score=whole and not args.no_score)


def protocol_of(benchmark: Benchmark, name: str | None) -> Protocol:
    """The first is the default."""
    for protocol in benchmark.protocols:
        if name in (None, protocol.name):
            return protocol
    known = "; ".join(f"{protocol.name}: {protocol.note}" for protocol in benchmark.protocols)
    raise UserError(f"{benchmark.name} has no protocol {name!r}. {known}.")


def requests_of(benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol) -> list["Request"]:
    from llava.eval.predict import Request

    requests = []
    for sample in samples:
        asked = benchmark.prompt(sample, protocol.name)
        before: dict[str, Any] = {"round_id": 0} if sample.options else {}
        letters = [chr(ord("A") + index) for index in range(len(sample.options))]
        after: dict[str, Any] = (
            {"options": list(sample.options), "option_char": letters} if sample.options else {}
        )
        recorded = benchmark.recorded(sample, asked)
        requests.append(Request(sample.id, asked, sample.image, recorded, before, after))
    return requests


def chunk(items: Sequence[Any], chunks: int, index: int) -> Sequence[Any]:
    """Part `index` of `chunks` contiguous parts of ceil(n / chunks); empty where no item is left for it."""
    if not 0 <= index < chunks:
        raise UserError(f"--chunk-idx {index} is not one of 0 to {chunks - 1} (--num-chunks {chunks}).")
    size = -(-len(items) // chunks)
    return items[index * size : (index + 1) * size]


def default_answers(benchmark: Benchmark, protocol: Protocol, args: argparse.Namespace) -> Path:
    """<root>/<folder>/answers/<model>[-<reducer>][-<protocol>].jsonl; chunks: .../<chunks>_<index>.jsonl."""
    from llava.mm_utils import get_model_name_from_path

    parts = [get_model_name_from_path(args.model_path)]
    parts += [args.reducer] if args.reducer else []
    parts += [protocol.name] if protocol is not benchmark.protocols[0] else []
    name = "-".join(parts).replace("/", "_")
    folder = args.root / benchmark.files[0].path.split("/")[0] / "answers"
    if args.num_chunks > 1:
        return folder / name / f"{args.num_chunks}_{args.chunk_idx}.jsonl"
    return folder / f"{name}.jsonl"


def default_decode_workers() -> int:
    return max(1, min(4, (os.cpu_count() or 1) - 1))


def finish(benchmark: Benchmark, root: Path, answers: Path, took: dict[str, Any], *, score: bool) -> int:
    """Print what came of it, keep the score beside the answers."""
    from llava.eval.provenance import Files, update_json
    from llava.eval.score import as_text, report_problems
    from llava.eval.score import score as score_answers

    problems = [f"question {one['question_id']}: {one['problem']}" for one in took["problems"]]
    print(f"{answers}: {took['answered']:,} of {took['questions']:,} questions answered")
    print("  " + as_rates(took))
    report_problems(problems)
    if not score or benchmark.measure is None or benchmark.read is not read_answers:
        if benchmark.write is not None:
            print(f"  next: llava submit {benchmark.name} --root {root} --answers {answers} --out FILE")
        return 1 if problems else 0
    try:
        report = score_answers(benchmark, root, [answers])
    except UserError as error:
        print(f"  not scored: {error}")
        return 1 if problems else 0
    result = {name: report[name] for name in ("headline", "metrics", "expected", "notes")}
    update_json(Files(answers).provenance, score=result)
    print(as_text(benchmark, report))
    return 0 if report["headline"] else 1


def as_rates(took: dict[str, Any]) -> str:
    if not took["device_seconds"]:
        return "nothing to do"
    tokens = took["visual_tokens"]
    seen = f"{tokens['mean']:.1f} visual tokens an image (p95 {tokens['p95']:.0f}), " if tokens else ""
    return f"{seen}{took['questions_per_second']:.2f} questions/s, {took['device_seconds']:.0f} s of work"


# --- one run, one or many processes ---


def answer(job: Job, *, workers: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Answers all requests of a job, together with every other process that runs the same one.

    Returns what it took (`predict.summary`). `workers`: processes to start, None for one per visible GPU.
    """
    from llava.eval.predict import NOTHING
    from llava.eval.store import remove

    if not job.requests:  # a chunk beyond the last question
        job.answers.parent.mkdir(parents=True, exist_ok=True)
        job.answers.touch()
        return NOTHING
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if overwrite:
        if world > 1:
            raise UserError(
                f"--overwrite and several processes of a launcher: delete {job.answers} yourself."
            )
        remove(job.answers)
    if world > 1:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        job = replace(job, processes=world)
        return work(job, device_of(job.model.device, rank), show_progress=rank == 0)
    count = visible_gpus(job.model.device) if workers is None else workers
    if count > 1:
        return lead(job, count)
    return work(job, job.model.device, show_progress=job.show_progress)


def visible_gpus(device: str) -> int:
    import torch

    return torch.cuda.device_count() if device == "cuda" else 1


def device_of(device: str, rank: int) -> str:
    """Processes spread over the GPUs where `device` names none of them."""
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{rank % gpus}" if device == "cuda" and gpus else device


def lead(job: Job, workers: int) -> dict[str, Any]:
    """Start the workers, show how far they are, and look at what is there in the end."""
    from llava.eval.predict import questions_of, summary
    from llava.eval.store import Store

    context = multiprocessing.get_context("spawn")
    share = max(1, (os.cpu_count() or 1) // workers)
    job = replace(job, decode_workers=min(job.decode_workers, share), processes=workers)
    started = [
        context.Process(target=_be_worker, args=(job, device_of(job.model.device, rank)))
        for rank in range(workers)
    ]
    try:
        for process in started:
            process.start()
        _watch(job, started)
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
    failed = [process.exitcode for process in started if process.exitcode]
    if len(failed) == workers:
        raise UserError(f"all {workers} workers ended with an error; their messages are above.")
    if failed:
        print(f"{len(failed)} of {workers} workers died; the others took over.", file=sys.stderr)
    store = Store(job.answers, questions_of(job.requests, workers), identity=None)
    try:
        return summary(store)
    finally:
        store.close()


def _watch(job: Job, processes: Sequence[multiprocessing.Process]) -> None:
    from tqdm import tqdm

    with tqdm(total=len(job.requests), unit="q", disable=not job.show_progress) as bar:
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            if job.answers.exists():
                done = job.answers.read_bytes().count(b"\n")
                bar.update(done - bar.n)


def _be_worker(job: Job, device: str) -> None:
    from llava.eval.predict import die_with_parent

    die_with_parent()
    try:
        work(job, device, show_progress=False)
    except UserError as error:
        print(f"worker on {device}: {error}", file=sys.stderr)
        sys.exit(2)


def work(job: Job, device: str, *, show_progress: bool) -> dict[str, Any]:
    """This process's part; returns when every question has an answer or a recorded problem, from whomever."""
    from llava.eval.predict import predict, questions_of, summary
    from llava.eval.store import Store
    from llava.mm_utils import get_model_name_from_path

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # image workers are forked
    answerer, facts = load(job, device)
    store = Store(job.answers, questions_of(job.requests, job.processes), dict(job.about) | facts["run"])
    try:
        if store.open_questions:
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            store.note({"sitting": {"started": started, **facts["machine"]}})
            predict(
                job.requests,
                answerer,
                store,
                get_model_name_from_path(job.model.path),
                decode_workers=job.decode_workers,
                show_progress=show_progress,
            )
        took = summary(store)
        sittings = [event["sitting"] for event in store.events() if "sitting" in event]
        store.update_provenance(summary=took, sittings=sittings)
        return took
    finally:
        store.close()


def load(job: Job, device: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """(the loaded model as the loop wants it, {"run": what makes the answers what they are, "machine":
    where}).

    `run` decides whether answers may be added to a file: the weights (by content), the reducer, the prompt,
    the pixels, the dtype and how words are chosen.
    """
    import torch
    import transformers

    from llava.conversation import default_conv_mode
    from llava.eval.predict import Answerer
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.packed import PackedLinear

    source = job.model
    name = get_model_name_from_path(source.path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        source.path,
        source.base,
        name,
        load_8bit=source.load_8bit,
        load_4bit=source.load_4bit,
        device=device,
        device_map=None if device == "cuda" else {"": device},
        reducer=source.reducer,
        vision_tower=source.vision_tower,
        dtype=source.dtype,
        attn_implementation=source.attention,
        packed=source.packed,
    )
    if image_processor is None:
        raise UserError(f"{source.path} is a language model without vision; a benchmark needs one that sees.")
    is_packed = source.packed and any(isinstance(module, PackedLinear) for module in model.modules())
    answerer = Answerer(
        model,
        tokenizer,
        image_processor,
        job.conv_mode or default_conv_mode(name, tokenizer),
        job.generation,
        image_aspect_ratio=job.image_aspect_ratio,
        batch_tokens=job.batch_tokens,
    )
    prompt = answerer.prompt("?", with_image=True)
    run = {
        "model": name,
        "weights": fingerprint(source.path, source.base),
        "base": source.base and get_model_name_from_path(source.base),
        "vision_tower": Path(source.vision_tower or model.config.mm_vision_tower).name,
        "reducer": model.reducer.spec,
        "conv_mode": answerer.conv_mode,
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "image_aspect_ratio": answerer.recipe.image_aspect_ratio,
        "generation": asdict(job.generation),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": "8bit" if source.load_8bit else "4bit" if source.load_4bit else None,
    }
    on_gpu = model.device.type == "cuda"
    machine = {
        "device": hardware.device_name(model.device) + ("" if on_gpu else f", {os.cpu_count()} cores"),
        "device_type": model.device.type,
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "llava": importlib.metadata.version("llava"),
        "threads": torch.get_num_threads(),
        "packed": is_packed,
    }
    return answerer, {"run": run, "machine": machine}


def fingerprint(model_path: str, model_base: str | None) -> str:
    """16 hex digits of what a checkpoint (with its base) holds: configs, and size, head and tail of each
    weight file. Copying a checkpoint keeps it, training changes it."""
    from llava.model.checkpoints import inspect_checkpoint

    info = inspect_checkpoint(model_path, model_base)
    digest = hashlib.sha256()
    for one in (info, info.base):
        if one is None:
            continue
        digest.update(json.dumps([one.config, one.adapter_config], sort_keys=True, default=str).encode())
        for file in one.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                digest.update(stream.read(1 << 16))
                stream.seek(max(0, size - (1 << 16)))
                digest.update(stream.read())
    return digest.hexdigest()[:16]
