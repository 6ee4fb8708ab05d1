"""What fewer visual tokens can save on a GPU, by arithmetic alone. `llava roofline` prints it.

Each operation takes max(FLOPs / peak, bytes / bandwidth). No torch, no GPU, no weights: a bound from below,
against which `llava bench` measures.

Unlike the accounting of the PruMerge paper's table (`paper_table.py`) this one counts the tower, the reducer
and the projector; attention is fused (scores never reach memory; keys and values are re-read once per block
of 128 queries); SwiGLU has its real width; an addition reads both operands; lm_head costs 2 FLOPs per weight
and is read in its real width; 4-bit weights are multiplied in 16 bits, as every kernel in use does.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llava.analysis import gpus
from llava.analysis.shapes import LanguageShape, Shape, TowerShape

QUERY_BLOCK = 128
"""Queries a fused attention kernel handles while it reads all keys and values once."""

NEIGHBOURS = 32
"""Patches PruMerge merges into each kept one."""


@dataclass(frozen=True)
class Precision:
    """Bytes per weight and per activation (and cached key or value), and which rate multiplies them.

    Attributes:
        rate: of products with (maybe quantised) weights, a field of `gpus.Gpu`.
        plain_rate: of everything else.
    """

    name: str
    weight_bytes: float
    activation_bytes: float
    rate: str = "half"
    plain_rate: str = "half"

    @property
    def plain(self) -> "Precision":
        """Of the parts that are never quantised: tower, projector, embeddings."""
        return Precision(
            self.name, self.activation_bytes, self.activation_bytes, self.plain_rate, self.plain_rate
        )


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp16", 2, 2),
        Precision("bf16", 2, 2),
        Precision("fp32", 4, 4, "single", "single"),
        Precision("w8a16", 1, 2),
        Precision("w4a16", 0.5, 2),
        Precision("w8a8", 1, 2, "int8"),  # activations rest in 16 bits and are quantised in the kernel
    )
}


@dataclass(frozen=True)
class Operator:
    """One operation: FLOPs, bytes read and written, and the rate (a field of `gpus.Gpu`) it runs at."""

    flops: float
    bytes: float
    rate: str


@dataclass(frozen=True)
class Estimate:
    """A stage on one GPU.

    Attributes:
        tflops: operations, 1e12.
        gigabytes: bytes moved, 1e9.
        ms: the bound from below on its time.
        bytes_share: the part of that time in which memory, not arithmetic, is the bottleneck.
    """

    tflops: float
    gigabytes: float
    ms: float
    bytes_share: float

    @property
    def bound(self) -> str:
        return "bytes" if self.bytes_share > 0.5 else "arithmetic"


@dataclass(frozen=True)
class Request:
    """The stages of a batch of requests, from pixels on the device to the first token, and one token more.

    Attributes:
        visual: visual tokens per image that reach the language model.
        kv_gb: cached keys and values after prefill, the whole batch, 1e9 bytes.
        weights_gb: tower, projector and language model.
    """

    visual: int
    vision: Estimate
    reduce: Estimate
    project: Estimate
    prefill: Estimate
    decode: Estimate
    kv_gb: float
    weights_gb: float

    @property
    def first_token_ms(self) -> float:
        """Vision, reduction, projection and prefill of the whole batch."""
        return self.vision.ms + self.reduce.ms + self.project.ms + self.prefill.ms


def estimate(operators: Iterable[Operator], gpu: gpus.Gpu) -> Estimate:
    """Sum of max(FLOPs / rate, bytes / bandwidth)."""
    rates = {"half": gpu.half, "single": gpu.single, "int8": gpu.int8}
    flops = moved = seconds = waiting = 0.0
    for operator in operators:
        arithmetic, memory = operator.flops / rates[operator.rate], operator.bytes / gpu.bandwidth
        flops += operator.flops
        moved += operator.bytes
        seconds += max(arithmetic, memory)
        waiting += memory if memory > arithmetic else 0.0
    return Estimate(flops / 1e12, moved / 1e9, seconds * 1e3, waiting / seconds if seconds else 0.0)


def product(rows: float, inputs: int, outputs: int, precision: Precision) -> Operator:
    """[rows, inputs] x [inputs, outputs]."""
    activations = rows * (inputs + outputs) * precision.activation_bytes
    weights = inputs * outputs * precision.weight_bytes
    return Operator(2 * rows * inputs * outputs, weights + activations, precision.rate)


def prefill_operators(
    language: LanguageShape, tokens: int, batch: int, precision: Precision
) -> list[Operator]:
    """All layers over `tokens` positions of `batch` sequences, and lm_head of the last position of each."""
    rows = batch * tokens
    row_bytes = rows * precision.activation_bytes
    blocks = math.ceil(tokens / QUERY_BLOCK)
    attention = Operator(
        batch * tokens**2 * (4 * language.hidden + 5 * language.heads),
        row_bytes * (2 * language.hidden + blocks * 2 * language.kv_width),
        precision.plain_rate,
    )
    layer = [
        *(product(rows, inputs, outputs, precision) for _, inputs, outputs in language.linears),
        attention,
        *_elementwise(language, rows, precision),
    ]
    return [*layer * language.layers, _head(language, batch, precision)]


def decode_operators(
    language: LanguageShape, context: int, batch: int, precision: Precision
) -> list[Operator]:
    """One more token for each of `batch` sequences whose cache holds `context` tokens."""
    attention = Operator(
        batch * context * (4 * language.hidden + 5 * language.heads),
        batch * (2 * context * language.kv_width + 2 * language.hidden) * precision.activation_bytes,
        precision.plain_rate,
    )
    layer = [
        *(product(batch, inputs, outputs, precision) for _, inputs, outputs in language.linears),
        attention,
        *_elementwise(language, batch, precision),
    ]
    return [*layer * language.layers, _head(language, batch, precision)]


def vision_operators(tower: TowerShape, images: int, blocks: int, precision: Precision) -> list[Operator]:
    """The first `blocks` blocks of a tower; its position-wise steps are taken as fused into the products."""
    plain = precision.plain
    tokens = tower.patches + 1
    rows = images * tokens
    block = [
        *[product(rows, tower.hidden, tower.hidden, plain)] * 4,
        product(rows, tower.hidden, tower.intermediate, plain),
        product(rows, tower.intermediate, tower.hidden, plain),
        Operator(
            4 * images * tokens**2 * tower.hidden,
            4 * rows * tower.hidden * plain.activation_bytes,
            plain.rate,
        ),
    ]
    return [product(images * tower.patches, 3 * tower.patch**2, tower.hidden, plain), *block * blocks]


def reduce_operators(tower: TowerShape, images: int, kept: int, precision: Precision) -> list[Operator]:
    """PruMerge: keys and the CLS query, CLS attention, kept x all similarities, weighted sums of neighbours.

    Nothing at all where every patch is kept.
    """
    if kept >= tower.patches:
        return []
    plain = precision.plain
    patches, hidden, width = tower.patches, tower.hidden, plain.activation_bytes
    keys = images * patches * hidden * width
    gathered = images * kept * (NEIGHBOURS + 2) * hidden * width
    return [
        product(images * (patches + 1), hidden, hidden, plain),
        product(images, hidden, hidden, plain),
        Operator(2 * images * patches * hidden, keys, plain.rate),
        Operator(
            2 * images * kept * patches * hidden,
            keys + images * kept * (hidden * width + patches * 4),  # similarities are float32
            plain.rate,
        ),
        Operator(2 * images * kept * NEIGHBOURS * hidden, gathered, plain.rate),
    ]


def project_operators(shape: Shape, images: int, visual: int, precision: Precision) -> list[Operator]:
    """mlp2x_gelu."""
    hidden, plain = shape.language.hidden, precision.plain
    return [
        product(images * visual, shape.tower.hidden, hidden, plain),
        product(images * visual, hidden, hidden, plain),
    ]


def request(
    shape: Shape,
    gpu: gpus.Gpu,
    precision: Precision,
    *,
    text: int,
    visual: int,
    batch: int,
) -> Request:
    """A batch of requests of `text` text tokens and one image each, of which `visual` tokens are kept."""
    language, tower, tokens = shape.language, shape.tower, text + visual
    # The features are the output of the last block but one: the last block is never run.
    vision = vision_operators(tower, batch, tower.layers - 1, precision)
    return Request(
        visual=visual,
        vision=estimate(vision, gpu),
        reduce=estimate(reduce_operators(tower, batch, visual, precision), gpu),
        project=estimate(project_operators(shape, batch, visual, precision), gpu),
        prefill=estimate(prefill_operators(language, tokens, batch, precision), gpu),
        decode=estimate(decode_operators(language, tokens, batch, precision), gpu),
        kv_gb=kv_bytes(language, tokens, batch, precision.activation_bytes) / 1e9,
        weights_gb=weight_bytes(shape, precision) / 1e9,
    )


def weight_bytes(shape: Shape, precision: Precision) -> float:
    """Tower, projector, embeddings, layers and head in device memory."""
    language, tower = shape.language, shape.tower
    embeddings = language.vocabulary * language.hidden
    head = 0 if language.tied_head else embeddings
    tower_weights = tower.layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)
    projector = tower.hidden * language.hidden + language.hidden**2
    quantised = (language.layers * language.layer_weights + head) * precision.weight_bytes
    return quantised + (embeddings + tower_weights + projector) * precision.activation_bytes


def kv_bytes(language: LanguageShape, tokens: int, batch: int, width: float) -> float:
    """Cached keys and values of `batch` sequences of `tokens` tokens, `width` bytes a number."""
    return batch * tokens * 2 * language.layers * language.kv_width * width


def break_even(gpu: gpus.Gpu, precision: Precision) -> float:
    """Tokens in flight (text + visual, times batch) below which weights take longer to read than to use.

    n tokens cost 2 n FLOPs per weight, a weight is read once: n = peak x bytes per weight / (2 bandwidth).
    """
    rate = {"half": gpu.half, "single": gpu.single, "int8": gpu.int8}[precision.rate]
    return rate * precision.weight_bytes / (2 * gpu.bandwidth)


def _elementwise(language: LanguageShape, rows: int, precision: Precision) -> list[Operator]:
    """Two norms (7 operations), two additions (two operands), SwiGLU's gate at its real width."""
    hidden = rows * language.hidden
    inner = rows * language.intermediate

    def operator(flops: float, numbers: float) -> Operator:
        return Operator(flops, numbers * precision.activation_bytes, precision.plain_rate)

    norm, add = operator(7 * hidden, 2 * hidden), operator(hidden, 3 * hidden)
    return [norm, norm, add, add, operator(2 * inner, 3 * inner)]


def _head(language: LanguageShape, rows: int, precision: Precision) -> Operator:
    """lm_head, quantised like the layers (bitsandbytes leaves it in 16 bits: 0.2 ms more on a V100)."""
    return product(rows, language.hidden, language.vocabulary, precision)
