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

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from llava import hardware
from llava.analysis import roofline
from llava.analysis.random_model import language_shape
from llava.analysis.shapes import LanguageShape
from llava.analysis.stopwatch import WALL, Clock, Spread, Stopwatch, peak_memory, reset_peak_memory
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.mm_utils import load_image, process_images
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.splice import gather, lay_out
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
        length: positions of the padded batch at prefill.
        kv_bytes: keys and values after prefill.
        peak_bytes: memory at the peak (the device's; on a CPU the process's), None if unknown.
    """

    ms: dict[str, float]
    visual_tokens: tuple[int, ...]
    answers: Tensor
    length: int
    kv_bytes: int
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
        flop_ratio: prefill FLOPs of the dense run to this one's: what the speed-up could be.
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
    flop_ratio: float
    kv_bytes: int
    peak_bytes: int | None
    roofline_prefill_ms: float | None


@torch.inference_mode()
def run_once(
    model: LlavaLlamaForCausalLM, image_processor, reducer: Reducer, work: Workload, clock: Clock = WALL
) -> Round:
    """One batch of requests from image bytes to the last token, greedily; stops for no end token."""
    device = model.device
    tower = model.get_vision_tower()
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
    with watch.stage("prefill"):
        layout = lay_out([work.prompt] * work.batch, [len(block) for block in embedded], padding_side="left")
        text = model.get_input_embeddings()(layout.text_ids.to(device))
        embeds = gather(layout, text, [block.to(text) for block in embedded])
        mask = layout.attention_mask.to(device) if layout.padded else None
        positions = layout.position_ids.to(device) if layout.padded else None
        cache = DynamicCache()
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = output.logits[:, -1:].argmax(-1)
    answers = [token]
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    steps = work.new_tokens - 1
    lengths = torch.tensor(layout.lengths, device=device)[:, None]
    with watch.stage("decode-token"):
        for step in range(steps):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(work.batch, 1)], dim=1)
            output = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=lengths + step,
                cache=cache,
                use_cache=True,
            )
            token = output.logits[:, -1:].argmax(-1)
            answers.append(token)
    watch.ms["decode-token"] /= max(steps, 1)
    return Round(
        ms=watch.ms,
        visual_tokens=tuple(len(block) for block in visual),
        answers=torch.cat(answers, dim=1),
        length=embeds.shape[1],
        kv_bytes=kv_bytes,
        peak_bytes=peak_memory(device),
    )


def interleave(
    runs: Sequence[Callable[[], object]], rounds: int, warmup: int, advance: Callable[[], None]
) -> list[list]:
    """Every run once per round, in turn; the results of the rounds after warm-up, by run."""
    kept: list[list] = [[] for _ in runs]
    for number in range(warmup + rounds):
        for run, results in zip(runs, kept, strict=True):
            result = run()
            if number >= warmup:
                results.append(result)
            advance()
    return kept


def summarise(
    reducer: str,
    rounds: Sequence[Round],
    dense: Sequence[Round],
    work: Workload,
    model: LlavaLlamaForCausalLM,
) -> Result:
    """What the rounds of one reducer say beside the dense rounds taken in turn with them."""

    def speedup(time: Callable[[Round], float]) -> float:
        return float(np.median([time(other) / time(one) for one, other in zip(rounds, dense, strict=True)]))

    one, full = rounds[0], dense[0]
    text = len(work.prompt) - 1
    shape = language_shape(model.config)
    real = sum(one.visual_tokens) + work.batch * text
    return Result(
        batch=work.batch,
        reducer=reducer,
        visual_tokens=float(np.mean(one.visual_tokens)),
        padding=1 - real / (work.batch * one.length),
        stages={stage: Spread.over([each.ms[stage] for each in rounds]) for stage in STAGES},
        first_token=Spread.over([each.first_token_ms for each in rounds]),
        request=Spread.over([each.request_ms(work.new_tokens) for each in rounds]),
        prefill_speedup=speedup(lambda each: each.ms["prefill"]),
        first_token_speedup=speedup(lambda each: each.first_token_ms),
        request_speedup=speedup(lambda each: each.request_ms(work.new_tokens)),
        flop_ratio=prefill_flops(shape, full.length) / prefill_flops(shape, one.length),
        kv_bytes=one.kv_bytes,
        peak_bytes=max((each.peak_bytes for each in rounds if each.peak_bytes is not None), default=None),
        roofline_prefill_ms=roofline_prefill(model, one.length, work.batch),
    )


def prefill_flops(shape: LanguageShape, length: int) -> float:
    """FLOPs of the prefill of one sequence of `length` positions."""
    return sum(op.flops for op in roofline.prefill_operators(shape, length, 1, roofline.PRECISIONS["fp16"]))


def roofline_prefill(model: LlavaLlamaForCausalLM, length: int, batch: int) -> float | None:
    """The bound on prefill time on the model's GPU, ms; None where the card is not in the table."""
    if model.device.type != "cuda":
        return None
    try:
        gpu = hardware.find_gpu(torch.cuda.get_device_name(model.device))
    except ValueError:
        return None
    precision = roofline.PRECISIONS["fp32" if model.dtype is torch.float32 else "fp16"]
    operators = roofline.prefill_operators(language_shape(model.config), length, batch, precision)
    return roofline.estimate(operators, gpu).ms


# Prefill alone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """Prefill of one length. ms for the whole batch; ratios are against the first length measured."""

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
    model: LlavaLlamaForCausalLM,
    lengths: Sequence[int],
    *,
    batch: int,
    rounds: int,
    warmup: int,
    clock: Clock,
) -> list[Prefill]:
    """Each length in turn, `rounds` times."""
    with tqdm(total=(rounds + warmup) * len(lengths), desc="prefill", file=sys.stderr) as bar:
        runs = [lambda length=length: prefill_once(model, length, batch, clock) for length in lengths]
        measured = interleave(runs, rounds, warmup, bar.update)
    shape = language_shape(model.config)
    first = measured[0]
    return [
        Prefill(
            length=length,
            time=Spread.over([ms for ms, _ in results]),
            speedup=float(
                np.median([other / ms for (ms, _), (other, _) in zip(results, first, strict=True)])
            ),
            flop_ratio=prefill_flops(shape, lengths[0]) / prefill_flops(shape, length),
            peak_bytes=max((peak for _, peak in results if peak is not None), default=None),
            roofline_ms=roofline_prefill(model, length, batch),
        )
        for length, results in zip(lengths, measured, strict=True)
    ]


# The tower alone -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerTime:
    """One way through the tower. ms for the whole batch; `part` is of the time of all its blocks."""

    way: str
    time: Spread
    part: float


@torch.inference_mode()
def measure_tower(
    tower: VisionTower, *, batch: int, rounds: int, warmup: int, clock: Clock
) -> list[TowerTime]:
    """All blocks as transformers runs them, what a reducer reads, and the patches alone, in turn."""
    side = tower.image_size
    pixels = torch.randn(batch, 3, side, side, device=tower.device, dtype=tower.dtype)
    ways = {
        "all blocks": tower.backbone,
        "patches, key and CLS query": tower,
        "patches": tower.tokens,
    }

    def once(way: Callable[[Tensor], object]) -> float:
        watch = Stopwatch(tower.device, clock)
        with watch.stage("tower"):
            way(pixels)
        return watch.ms["tower"]

    with tqdm(total=(rounds + warmup) * len(ways), desc="tower", file=sys.stderr) as bar:
        runs = [lambda way=way: once(way) for way in ways.values()]
        measured = interleave(runs, rounds, warmup, bar.update)
    whole = measured[0]
    return [
        TowerTime(
            way=name,
            time=Spread.over(times),
            part=float(np.median([one / other for one, other in zip(times, whole, strict=True)])),
        )
        for name, times in zip(ways, measured, strict=True)
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
