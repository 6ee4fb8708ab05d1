"""The loop of an evaluation: questions, answered by an engine, appended to an answers file, summed up.

The same command goes on with a run that was killed: what has an answer, in whichever file of the run, is not
asked again (llava/eval/store.py). Several processes, started here or by torchrun, take every n-th image each,
with all its questions, and write a file of their own; the first one sums up when all have ended.
"""

import hashlib
import multiprocessing
import os
import platform
import secrets
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from llava import __version__, hardware
from llava.engine import EndpointEngine, LocalEngine, ModelSource, Request, key_of
from llava.errors import UserError
from llava.eval.provenance import Files, fingerprint, summary
from llava.eval.store import AnswersFile
from llava.mm_utils import get_model_name_from_path
from llava.pixels import die_with_parent


@dataclass(frozen=True)
class Job:
    """A run: everything one process needs to take part in it. It is sent to worker processes as it is.

    Attributes:
        requests: their ids are their places in `lines`.
        lines: what each request's line in the answers file will hold beside its answer, in the file's order
            of keys: question_id, (round_id,) prompt, text "", (options, option_char).
        about: what else makes the run what it is: benchmark, protocol, chunk.
    """

    requests: Sequence[Request]
    lines: Sequence[dict[str, Any]]
    model: ModelSource | EndpointEngine
    answers: Path
    about: dict[str, Any]
    image_aspect_ratio: str | None = None  # None: the checkpoint's
    batch_tokens: int | None = None
    decode_workers: int = 1


def answer(job: Job, *, workers: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Answers what is missing; returns what the run took so far (`provenance.summary`).

    Args:
        workers: processes to start; None: one per visible GPU.
        overwrite: begin anew where the answers file exists.
    """
    files = Files(job.answers)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if overwrite and world > 1:
        raise UserError(f"--overwrite and several processes of a launcher: delete {job.answers} yourself.")
    if overwrite:
        with AnswersFile(job.answers, job.lines):  # not under another process that writes it
            files.remove()
    if not job.requests:  # a chunk beyond the last question
        job.answers.parent.mkdir(parents=True, exist_ok=True)
        job.answers.touch()
        return summary(files, (), ())
    if workers is None:
        on_gpus = isinstance(job.model, ModelSource) and job.model.device == "cuda"
        workers = torch.cuda.device_count() if on_gpus else 1
    if world > 1:
        work(job, rank, world, int(os.environ.get("LOCAL_RANK", rank)))
    elif workers > 1:
        work_in_processes(job, workers)
    else:
        work(job)
    if rank > 0:  # the first process waits for the others and sums up
        return summary(files, job.lines, range(len(job.lines)))
    with AnswersFile(job.answers, job.lines) as file:
        file.merge()
        took = summary(files, job.lines, file.answered())
    machines = [event["session"] for event in files.events() if "session" in event]
    files.update(summary=took, sessions=machines)
    return took


def work(job: Job, rank: int = 0, world: int = 1, gpu: int | None = None) -> None:
    """This process's share of the questions that have no answer yet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes that decode images are forked
    files = Files(job.answers)
    with AnswersFile(job.answers, job.lines, None if world == 1 else rank) as file:
        engine = load(job, gpu)
        files.agree(run_facts(job, engine))
        mine = share(job.requests, rank, world)
        answered = file.answered()
        missing = [request for request in mine if request.id not in answered]
        if not missing:
            return
        files.note(session={"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **machine_facts(engine)})
        bar = tqdm(total=len(mine), initial=len(mine) - len(missing), unit="q", disable=rank > 0)
        # Images of which tokens are in the log.
        counted = {key_of(image) for one in mine if one.id in answered for image in one.images}
        since = time.perf_counter()
        for one in engine.answer(missing):
            if one.problem:
                question_id = job.lines[one.id]["question_id"]
                files.note(index=one.id, question_id=question_id, problem=one.problem)
            else:
                answer_id = secrets.token_urlsafe(16)  # 22 characters, as LLaVA's
                end = {"answer_id": answer_id, "model_id": job.model.name, "metadata": {}}
                file.append({**job.lines[one.id], "text": one.text, **end})
            tokens: Counter[int] = Counter()
            for image, count in zip(
                map(key_of, job.requests[one.id].images), one.visual_tokens, strict=False
            ):
                tokens[count] += image not in counted
                counted.add(image)
            now = time.perf_counter()
            files.note(questions=1, visual_tokens=+tokens, seconds=round(now - since, 4))
            since = now
            bar.update()
        bar.close()


def share(requests: Sequence[Request], rank: int, world: int) -> list[Request]:
    """Every world-th image from the rank-th on, with all its questions; likewise without image."""
    images: dict[Any, int] = {}
    for request in requests:
        images.setdefault(tuple(request.images) or request.id, len(images))
    return [one for one in requests if images[tuple(one.images) or one.id] % world == rank]


def work_in_processes(job: Job, workers: int) -> None:
    """One process per GPU, or all on the CPU. The work of one that dies is left to the next command."""
    context = multiprocessing.get_context("spawn")
    job = replace(job, decode_workers=min(job.decode_workers, max(1, (os.cpu_count() or 1) // workers)))
    processes = [context.Process(target=_process, args=(job, rank, workers)) for rank in range(workers)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed == workers:
        raise UserError(f"all {workers} processes ended with an error; their messages are above.")
    if failed:
        print(f"{failed} of {workers} processes ended early.", file=sys.stderr)


def _process(job: Job, rank: int, world: int) -> None:
    die_with_parent()
    try:
        work(job, rank, world, rank)
    except UserError as error:
        print(f"process {rank}: {error}", file=sys.stderr)
        sys.exit(2)


def load(job: Job, gpu: int | None) -> LocalEngine | EndpointEngine:
    """The model, on the gpu-th device of several where `device` names none."""
    if isinstance(job.model, EndpointEngine):
        return job.model
    gpus = torch.cuda.device_count()
    device = (
        f"cuda:{gpu % gpus}" if job.model.device == "cuda" and gpus and gpu is not None else job.model.device
    )
    return replace(job.model, device=device).load(
        image_aspect_ratio=job.image_aspect_ratio,
        batch_tokens=job.batch_tokens,
        decode_workers=job.decode_workers,
    )


def run_facts(job: Job, engine: LocalEngine | EndpointEngine) -> dict[str, Any]:
    """What makes the answers what they are: only a run in which all of it is the same may add to a file."""
    first = job.requests[0]
    names = ("max_new_tokens", "temperature", "top_p", "num_beams", "seed")
    facts = {
        **job.about,
        "model": job.model.name,
        "generation": {name: getattr(first, name) for name in names},
    }
    if isinstance(job.model, EndpointEngine):
        unknown = "the server's"
        reducer = first.reducer or unknown
        return facts | {"server": engine.base_url, "weights": unknown, "reducer": reducer, "dtype": unknown}
    source, model = job.model, engine.model
    prompt = engine.prompt(Request(text="?", images=("",)))
    return facts | {
        "weights": fingerprint(source.path, source.base),
        "base": source.base and get_model_name_from_path(source.base),
        "vision_tower": Path(source.vision_tower or model.config.mm_vision_tower).name,
        "reducer": model.reducer.spec,
        "conv_mode": engine.conv_mode,
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "image_aspect_ratio": engine.pixel_config.image_aspect_ratio,
        "anyres": source.anyres,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": "8bit" if source.load_8bit else "4bit" if source.load_4bit else None,
    }


def machine_facts(engine: LocalEngine | EndpointEngine) -> dict[str, Any]:
    """Where answers are made."""
    if isinstance(engine, EndpointEngine):
        return {"device": engine.base_url, "concurrency": engine.concurrency}
    device = engine.model.device
    cores = "" if device.type == "cuda" else f", {os.cpu_count()} cores"
    return {
        "device": hardware.device_name(device) + cores,
        "device_type": device.type,
        "attention": engine.model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "llava": __version__,
        "threads": torch.get_num_threads(),
    }
