"""How long the stages of a request take, measured so that runs can be compared.

A request is split into stages, each begun and ended with the device idle. The dense run (reducer `none`,
same dtype, same attention kernel) is always among the runs, and the runs take turns within a round (A B A B),
so that a machine that slows down slows all of them. Figures are medians and 95th percentiles over rounds,
after warm-up rounds that are thrown away. `llava bench` (bench.py) is the command.
"""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llava.analysis import gpus, roofline
from llava.analysis.stopwatch import WALL, Clock, Spread, Stopwatch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.mm_utils import load_image, process_images
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.reducers import Reducer

STAGES = ("decode-image", "preprocess", "vision", "reduce", "project", "prefill", "decode-token")
"""`decode-token` is one token after the first; the others happen once per request."""

TOTALS = ("first token", "request")

DENSE = "none"

WARMUP = 2
"""Rounds that are thrown away."""


@dataclass(frozen=True)
class Workload:
    """A batch of equal requests: one picture and one prompt each.

    Attributes:
        picture: an image file's bytes.
        prompt: [T] int64 ids with one IMAGE_TOKEN_INDEX.
        batch: requests at once.
        new_tokens: length of an answer.
        read_question: what a reducer reads of the question (`llava.model.question`); None: it is not known.
    """

    picture: bytes
    prompt: Tensor
    batch: int
    new_tokens: int
    read_question: Callable[[Reducer], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Round:
    """One request batch, once.

    Attributes:
        ms: by stage and by `TOTALS`, for the whole batch.
        visual_tokens: of each image, as they reach the language model.
        answers: [B, new_tokens] the ids that were decoded.
        peak_bytes: memory of the GPU at the peak, None on other devices.
    """

    ms: dict[str, float]
    visual_tokens: int
    answers: Tensor
    peak_bytes: int | None


@dataclass(frozen=True)
class Result:
    """A reducer at a batch size, over all rounds. Times in ms, for the whole batch.

    Attributes:
        visual_tokens: per image.
        stages: by stage and by `TOTALS`.
        *_speedup: of the dense run's time to this one's, the median over rounds.
        reducer_share: the reducer's time as a part of the tower's, the median over rounds.
        flop_ratio: prefill FLOPs of the dense run to this one's: what the speed-up could be.
        kv_bytes: keys and values after prefill.
        roofline_prefill_ms: bound from below on this GPU, None for devices not in the table.
    """

    batch: int
    reducer: str
    visual_tokens: int
    stages: dict[str, Spread]
    prefill_speedup: float
    first_token_speedup: float
    request_speedup: float
    reducer_share: float
    flop_ratio: float
    kv_bytes: int
    peak_bytes: int | None
    roofline_prefill_ms: float | None


@torch.inference_mode()
def run_once(model: LlavaMetaForCausalLM, reducer: Reducer, work: Workload, clock: Clock = WALL) -> Round:
    """One batch of requests from image bytes to the last token, greedily; stops for no end token."""
    device, tower = model.device, model.get_vision_tower()
    watch, on_gpu = Stopwatch(device, clock), device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with watch.stage("decode-image"):
        images = [load_image(work.picture, name="the picture") for _ in range(work.batch)]
    with watch.stage("preprocess"):
        pixels = process_images(images, tower.image_processor, model.config)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            raise UserError("bench measures one view per picture; image_aspect_ratio anyres makes several.")
        pixels = pixels.to(device, tower.dtype)
    if reducer.name == DENSE:
        with watch.stage("vision"):
            visual = list(tower.tokens(pixels))
        watch.ms["reduce"] = 0.0
    else:
        with watch.stage("vision"):
            features = tower(pixels, reducer.asks)
        with watch.stage("reduce"):  # with what it reads beside the tower
            features = model.with_projected(features, reducer.reads)
            if reducer.reads_question and work.read_question is not None:
                read: Any = work.read_question(reducer)
                features = replace(features, **read)
            visual = reducer(features).unbind()
    with watch.stage("project"):
        embedded = model.project(visual)

    times: list[float] = []

    def note_time(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """A stopping criterion that stops nothing: generate calls it when a new token is there."""
        times.append(watch.now())
        return ids.new_zeros(len(ids), dtype=torch.bool)

    start = watch.now()
    answers = model.generate(
        work.prompt.expand(work.batch, -1),
        visual_embeds=embedded,
        do_sample=False,
        min_new_tokens=work.new_tokens,
        max_new_tokens=work.new_tokens,
        pad_token_id=0,
        stopping_criteria=[note_time],
    )
    ms = watch.ms
    ms["prefill"] = 1e3 * (times[0] - start)
    ms["first token"] = sum(ms.values())
    decoding = 1e3 * (times[-1] - times[0])
    ms["decode-token"] = decoding / max(work.new_tokens - 1, 1)
    ms["request"] = ms["first token"] + decoding
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Round(ms, len(visual[0]), answers, peak)


def interleave(runs: Sequence[Callable[[], Any]], rounds: int, name: str) -> list[list[Any]]:
    """Every run once per round, in turn; the results of the rounds after warm-up, by run."""
    kept: list[list[Any]] = [[] for _ in runs]
    with tqdm(total=(rounds + WARMUP) * len(runs), desc=name, file=sys.stderr) as bar:
        for number in range(WARMUP + rounds):
            for run, results in zip(runs, kept, strict=True):
                result = run()
                if number >= WARMUP:
                    results.append(result)
                bar.update()
    return kept


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of one run's figure by another's of the same round."""
    return float(np.median(np.divide(above, below)))


def summarise(
    reducer: str, rounds: Sequence[Round], dense: Sequence[Round], work: Workload, model: LlavaMetaForCausalLM
) -> Result:
    """What the rounds of one reducer say beside the dense rounds taken in turn with them."""
    ms = {stage: [each.ms[stage] for each in rounds] for stage in (*STAGES, *TOTALS)}

    def speedup(stage: str) -> float:
        return median_ratio([each.ms[stage] for each in dense], ms[stage])

    text, visual, shape = len(work.prompt) - 1, rounds[0].visual_tokens, model.config
    dense_flops = prefill_flops(shape, text + dense[0].visual_tokens)
    return Result(
        batch=work.batch,
        reducer=reducer,
        visual_tokens=visual,
        stages={stage: Spread.over(values) for stage, values in ms.items()},
        prefill_speedup=speedup("prefill"),
        first_token_speedup=speedup("first token"),
        request_speedup=speedup("request"),
        reducer_share=median_ratio(ms["reduce"], ms["vision"]),
        flop_ratio=dense_flops / prefill_flops(shape, text + visual),
        kv_bytes=int(roofline.kv_bytes(shape, text + visual, work.batch, model.dtype.itemsize)),
        peak_bytes=rounds[-1].peak_bytes,
        roofline_prefill_ms=roofline_prefill(model, text + visual, work.batch),
    )


def prefill_flops(shape: Any, length: int) -> float:
    """FLOPs of the prefill of one sequence of `length` positions; `shape`: a LanguageShape or a config."""
    return sum(op.flops for op in roofline.decoder_operators(shape, length, length, 1))


def roofline_prefill(model: LlavaMetaForCausalLM, length: int, batch: int) -> float | None:
    """The bound on prefill time in 16 bits on the model's GPU, ms; None elsewhere, and for other cards."""
    if model.device.type != "cuda" or model.dtype is torch.float32:
        return None
    try:
        gpu = gpus.find_gpu(torch.cuda.get_device_name(model.device))
    except ValueError:
        return None
    shape: Any = model.config
    return roofline.estimate(roofline.decoder_operators(shape, length, length, batch), gpu).ms


@dataclass(frozen=True)
class Timing:
    """One of several calls. ms for the whole batch; `speedup`: of the first call's time to this one's."""

    batch: int
    name: str
    time: Spread
    speedup: float


@torch.inference_mode()
def measure(
    calls: Mapping[str, Callable[[], object]], device: torch.device, batch: int, rounds: int, clock: Clock
) -> list[Timing]:
    """The calls in turn, `rounds` times each."""

    def once(call: Callable[[], object]) -> float:
        watch = Stopwatch(device, clock)
        with watch.stage("call"):
            call()
        return watch.ms["call"]

    measured = interleave([partial(once, call) for call in calls.values()], rounds, f"batch {batch}")
    return [
        Timing(batch, name, Spread.over(times), median_ratio(measured[0], times))
        for name, times in zip(calls, measured, strict=True)
    ]


def prompt_ids(text: int, vocabulary: int) -> Tensor:
    """`text` arbitrary ids with the picture's placeholder in their middle: what they say costs no time."""
    ids = torch.randint(3, vocabulary, (text,), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids[: text // 2], torch.tensor([IMAGE_TOKEN_INDEX]), ids[text // 2 :]])


def picture_bytes(path: Path | None) -> bytes:
    """An image file, or a drawn JPEG of 640 x 480 with as much detail as a photograph has."""
    if path is not None:
        load_image(path)  # its errors are for people
        return path.read_bytes()
    noise, file = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
