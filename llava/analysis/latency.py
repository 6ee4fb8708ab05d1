"""How long the stages of a request take, measured so that runs can be compared.

A request is split into stages, each begun and ended with the device idle. The dense run (reducer `none`,
same dtype, same attention kernel) is always among the runs, and the runs take turns within a round (A B A B),
so that a machine that slows down slows all of them. Figures are medians and 95th percentiles over rounds,
after warm-up rounds that are thrown away. `llava bench` (bench.py) is the command.
"""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from llava.analysis import gpus, roofline
from llava.analysis.random_model import language_shape
from llava.analysis.shapes import LanguageShape
from llava.analysis.stopwatch import WALL, Clock, Spread, Stopwatch, peak_memory, reset_peak_memory
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.mm_utils import load_image, process_images
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import VisionTower
from llava.reducers import Reducer

STAGES = ("decode-image", "preprocess", "vision", "reduce", "project", "prefill", "decode-token")
"""`decode-token` is one token after the first; the others happen once per request."""

FIRST = STAGES[:-1]
"""The stages up to the first token."""

DENSE = "none"


@dataclass(frozen=True)
class Workload:
    """A batch of equal requests: one picture and one prompt each.

    Attributes:
        picture: an image file's bytes.
        prompt: [T] int64 ids with one IMAGE_TOKEN_INDEX.
        batch: requests at once.
        new_tokens: length of an answer.
    """

    picture: bytes
    prompt: Tensor
    batch: int
    new_tokens: int


@dataclass(frozen=True)
class Round:
    """One request batch, once.

    Attributes:
        ms: by stage, for the whole batch.
        visual_tokens: per image, as they reach the language model.
        answers: [B, new_tokens] the ids that were decoded.
        peak_bytes: memory at the peak (the device's; on a CPU the process's), None if unknown.
    """

    ms: dict[str, float]
    visual_tokens: tuple[int, ...]
    answers: Tensor
    peak_bytes: int | None

    @property
    def first_token_ms(self) -> float:
        return sum(self.ms[stage] for stage in FIRST)

    def request_ms(self, new_tokens: int) -> float:
        return self.first_token_ms + (new_tokens - 1) * self.ms["decode-token"]


@dataclass(frozen=True)
class Result:
    """A reducer at a batch size, over all rounds. Times in ms, for the whole batch.

    Attributes:
        visual_tokens: mean per image.
        padding: part of the prefill batch that is padding.
        *_speedup: of the dense run's time to this one's, the median over rounds.
        reducer_share: the reducer's time as a part of the tower's, the median over rounds.
        flop_ratio: prefill FLOPs of the dense run to this one's: what the speed-up could be.
        kv_bytes: keys and values after prefill.
        roofline_prefill_ms: bound from below on this GPU, None for devices not in the table.
    """

    batch: int
    reducer: str
    visual_tokens: float
    padding: float
    stages: dict[str, Spread]
    first_token: Spread
    request: Spread
    prefill_speedup: float
    first_token_speedup: float
    request_speedup: float
    reducer_share: float
    flop_ratio: float
    kv_bytes: int
    peak_bytes: int | None
    roofline_prefill_ms: float | None


class TokenTimes(StoppingCriteria):
    """Stops nothing; notes when each new token of `generate` is there."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.seconds.append(self.watch.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def run_once(
    model: LlavaLlamaForCausalLM, image_processor: Any, reducer: Reducer, work: Workload, clock: Clock = WALL
) -> Round:
    """One batch of requests from image bytes to the last token, greedily; stops for no end token."""
    device, tower = model.device, model.get_vision_tower()
    watch = Stopwatch(device, clock)
    reset_peak_memory(device)
    with watch.stage("decode-image"):
        images = [load_image(work.picture, name="the picture") for _ in range(work.batch)]
    with watch.stage("preprocess"):
        pixels = process_images(images, image_processor, model.config)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            raise UserError("bench measures one view per picture; image_aspect_ratio anyres makes several.")
        pixels = pixels.to(device, tower.dtype)
    if reducer.name == DENSE:
        with watch.stage("vision"):
            visual = list(tower.tokens(pixels))
        watch.ms["reduce"] = 0.0
    else:
        with watch.stage("vision"):
            features = tower(pixels)
        with watch.stage("reduce"):
            visual = reducer(features).unbind()
    with watch.stage("project"):
        embedded = model.project(visual)

    tokens, start = TokenTimes(watch), watch.now()
    answers = model.generate(
        work.prompt.expand(work.batch, -1),
        visual_embeds=embedded,
        do_sample=False,
        min_new_tokens=work.new_tokens,
        max_new_tokens=work.new_tokens,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([tokens]),
    )
    first, last = tokens.seconds[0], tokens.seconds[-1]
    watch.ms["prefill"] = 1e3 * (first - start)
    watch.ms["decode-token"] = 1e3 * (last - first) / max(work.new_tokens - 1, 1)
    return Round(watch.ms, tuple(map(len, visual)), answers, peak_memory(device))


def interleave(
    runs: Sequence[Callable[[], Any]], rounds: int, warmup: int, name: str = "bench"
) -> list[list[Any]]:
    """Every run once per round, in turn; the results of the rounds after warm-up, by run."""
    kept: list[list[Any]] = [[] for _ in runs]
    with tqdm(total=(rounds + warmup) * len(runs), desc=name, file=sys.stderr) as bar:
        for number in range(warmup + rounds):
            for run, results in zip(runs, kept, strict=True):
                result = run()
                if number >= warmup:
                    results.append(result)
                bar.update()
    return kept


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of one run's figure by another's of the same round."""
    return float(np.median(np.divide(above, below)))


def summarise(
    reducer: str,
    rounds: Sequence[Round],
    dense: Sequence[Round],
    work: Workload,
    model: LlavaLlamaForCausalLM,
) -> Result:
    """What the rounds of one reducer say beside the dense rounds taken in turn with them."""

    def speedup(time: Callable[[Round], float]) -> float:
        return median_ratio(list(map(time, dense)), list(map(time, rounds)))

    text, visual, shape = len(work.prompt) - 1, rounds[0].visual_tokens, language_shape(model.config)
    length = text + max(visual)  # of every row of the padded batch
    return Result(
        batch=work.batch,
        reducer=reducer,
        visual_tokens=float(np.mean(visual)),
        padding=1 - (text + float(np.mean(visual))) / length,
        stages={stage: Spread.over([each.ms[stage] for each in rounds]) for stage in STAGES},
        first_token=Spread.over([each.first_token_ms for each in rounds]),
        request=Spread.over([each.request_ms(work.new_tokens) for each in rounds]),
        prefill_speedup=speedup(lambda each: each.ms["prefill"]),
        first_token_speedup=speedup(lambda each: each.first_token_ms),
        request_speedup=speedup(lambda each: each.request_ms(work.new_tokens)),
        reducer_share=median_ratio(
            [each.ms["reduce"] for each in rounds], [each.ms["vision"] for each in rounds]
        ),
        flop_ratio=prefill_flops(shape, text + max(dense[0].visual_tokens)) / prefill_flops(shape, length),
        kv_bytes=int(roofline.kv_bytes(shape, length, work.batch, model.dtype.itemsize)),
        peak_bytes=max((each.peak_bytes for each in rounds if each.peak_bytes is not None), default=None),
        roofline_prefill_ms=roofline_prefill(model, length, work.batch),
    )


def prefill_flops(shape: LanguageShape, length: int) -> float:
    """FLOPs of the prefill of one sequence of `length` positions."""
    return sum(op.flops for op in roofline.prefill_operators(shape, length, 1, roofline.PRECISIONS["fp16"]))


def roofline_prefill(model: LlavaLlamaForCausalLM, length: int, batch: int) -> float | None:
    """The bound on prefill time on the model's GPU, ms; None where the card is not in the table."""
    if model.device.type != "cuda":
        return None
    try:
        gpu = gpus.find_gpu(torch.cuda.get_device_name(model.device))
    except ValueError:
        return None
    precision = roofline.PRECISIONS["fp32" if model.dtype is torch.float32 else "fp16"]
    operators = roofline.prefill_operators(language_shape(model.config), length, batch, precision)
    return roofline.estimate(operators, gpu).ms


# Prefill alone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """Prefill of one length. ms for the whole batch; ratios are against the first length measured."""

    batch: int
    length: int
    time: Spread
    speedup: float
    flop_ratio: float
    peak_bytes: int | None
    roofline_ms: float | None


@torch.inference_mode()
def prefill_once(
    model: LlavaLlamaForCausalLM, length: int, batch: int, clock: Clock = WALL
) -> tuple[float, int | None]:
    """Time (ms) and peak memory of one prefill of random embeddings."""
    embeds = torch.randn(batch, length, model.config.hidden_size, device=model.device, dtype=model.dtype)
    watch = Stopwatch(model.device, clock)
    reset_peak_memory(model.device)
    with watch.stage("prefill"):
        model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return watch.ms["prefill"], peak_memory(model.device)


def measure_prefill(
    model: LlavaLlamaForCausalLM, lengths: Sequence[int], batch: int, rounds: int, warmup: int, clock: Clock
) -> list[Prefill]:
    """Each length in turn, `rounds` times."""
    runs = [lambda length=length: prefill_once(model, length, batch, clock) for length in lengths]
    shape, rows, dense = language_shape(model.config), [], None
    for length, results in zip(lengths, interleave(runs, rounds, warmup, "prefill"), strict=True):
        times, peaks = zip(*results, strict=True)
        dense = dense or times
        rows.append(
            Prefill(
                batch=batch,
                length=length,
                time=Spread.over(times),
                speedup=median_ratio(dense, times),
                flop_ratio=prefill_flops(shape, lengths[0]) / prefill_flops(shape, length),
                peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
                roofline_ms=roofline_prefill(model, length, batch),
            )
        )
    return rows


# The tower alone -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerTime:
    """One way through the tower, or a reducer. ms for the whole batch; `part`: of the time of all blocks."""

    batch: int
    way: str
    time: Spread
    part: float


@torch.inference_mode()
def measure_tower(
    tower: VisionTower, reducers: Sequence[Reducer], batch: int, rounds: int, warmup: int, clock: Clock
) -> list[TowerTime]:
    """All blocks as transformers runs them, what a reducer reads, the patches alone, reducers; in turn."""
    side = tower.image_size
    pixels = torch.randn(batch, 3, side, side, device=tower.device, dtype=tower.dtype)
    features = tower(pixels)
    ways: dict[str, Callable[[], object]] = {
        "all blocks": lambda: tower.backbone(pixels),
        "patches, key and CLS query": lambda: tower(pixels),
        "patches": lambda: tower.tokens(pixels),
        **{reducer.spec: lambda reducer=reducer: reducer(features) for reducer in reducers},
    }

    def once(way: Callable[[], object]) -> float:
        watch = Stopwatch(tower.device, clock)
        with watch.stage("tower"):
            way()
        return watch.ms["tower"]

    runs = [lambda way=way: once(way) for way in ways.values()]
    measured = interleave(runs, rounds, warmup, "tower")
    return [
        TowerTime(batch, way, Spread.over(times), median_ratio(times, measured[0]))
        for way, times in zip(ways, measured, strict=True)
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
    noise = np.random.default_rng(0)
    layers = [
        Image.fromarray(noise.integers(0, 256, (3 * size, 4 * size, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        for size in (2, 8, 40)
    ]
    mixed = Image.blend(Image.blend(layers[0], layers[1], 0.35), layers[2], 0.2)
    file = io.BytesIO()
    mixed.save(file, "JPEG", quality=90)
    return file.getvalue()
