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

from llava.analysis.gpus import Gpu
from llava.analysis.shapes import (
    LanguageShape,
    Shape,
    TowerShape,
    decoder_weights,
    kv_width,
    linears,
    query_width,
)

QUERY_BLOCK = 128
"""Queries a fused attention kernel handles while it reads all keys and values once."""

NEIGHBOURS = 32
"""Patches PruMerge merges into each kept one."""

HALF = 2.0
"""Bytes of an activation, a cached key or value, and a weight that is never quantised."""

PRECISIONS = {"fp16": HALF, "w8a16": 1.0, "w4a16": 0.5}
"""Bytes per weight of the decoder's layers and head. bfloat16 counts as float16 does."""


@dataclass(frozen=True)
class Operator:
    """One operation: FLOPs, and bytes read and written."""

    flops: float
    bytes: float


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


def estimate(operators: Iterable[Operator], gpu: Gpu) -> Estimate:
    """Sum of max(FLOPs / rate, bytes / bandwidth)."""
    flops = moved = seconds = waiting = 0.0
    for operator in operators:
        arithmetic, memory = operator.flops / gpu.half, operator.bytes / gpu.bandwidth
        flops += operator.flops
        moved += operator.bytes
        seconds += max(arithmetic, memory)
        waiting += memory if memory > arithmetic else 0.0
    return Estimate(flops / 1e12, moved / 1e9, seconds * 1e3, waiting / seconds if seconds else 0.0)


def request(shape: Shape, gpu: Gpu, *, text: int, visual: int, batch: int, width: float = HALF) -> Request:
    """A batch of requests of `text` text tokens and one image each, of which `visual` tokens are kept.

    `width`, here and below: a value of `PRECISIONS`.
    """
    language, tower, tokens = shape.language, shape.tower, text + visual
    # The features are the output of the last block but one: the last block is never run.
    vision = vision_operators(tower, batch, tower.num_hidden_layers - 1)
    # mlp2x_gelu
    projector = [
        product(batch * visual, tower.hidden_size, language.hidden_size),
        product(batch * visual, language.hidden_size, language.hidden_size),
    ]
    return Request(
        visual=visual,
        vision=estimate(vision, gpu),
        reduce=estimate(reduce_operators(tower, batch, visual), gpu),
        project=estimate(projector, gpu),
        prefill=estimate(decoder_operators(language, tokens, tokens, batch, width), gpu),
        decode=estimate(decoder_operators(language, 1, tokens, batch, width), gpu),
        kv_gb=kv_bytes(language, tokens, batch) / 1e9,
        weights_gb=weight_bytes(shape, width) / 1e9,
    )


def product(rows: float, inputs: int, outputs: int, width: float = HALF) -> Operator:
    """[rows, inputs] x [inputs, outputs]."""
    return Operator(2 * rows * inputs * outputs, inputs * outputs * width + rows * (inputs + outputs) * HALF)


def decoder_operators(
    language: LanguageShape, queries: int, context: int, batch: int, width: float = HALF
) -> list[Operator]:
    """All layers over `queries` new positions of each sequence, and lm_head over the last of them.

    Each position looks at `context` others: n and n in prefill, 1 and n in decoding.
    """
    heads, rows = query_width(language), batch * queries
    attention = Operator(
        rows * context * (4 * heads + 5 * language.num_attention_heads),
        (rows * 2 * heads + batch * math.ceil(queries / QUERY_BLOCK) * 2 * context * kv_width(language))
        * HALF,
    )
    hidden, inner = rows * language.hidden_size, rows * language.intermediate_size
    norm = Operator(7 * hidden, 2 * hidden * HALF)
    add = Operator(hidden, 3 * hidden * HALF)  # reads two operands
    gate = Operator(2 * inner, 3 * inner * HALF)  # SwiGLU's silu(gate) * up, at its real width
    products = [product(rows, inputs, outputs, width) for _, inputs, outputs in linears(language)]
    layer = [*products, attention, norm, norm, add, add, gate]
    # lm_head is quantised like the layers (bitsandbytes leaves it in 16 bits: 0.2 ms more on a V100).
    head = product(batch, language.hidden_size, language.vocab_size, width)
    return [*layer * language.num_hidden_layers, head]


def vision_operators(tower: TowerShape, images: int, blocks: int) -> list[Operator]:
    """The first `blocks` blocks of a tower; its position-wise steps are taken as fused into the products."""
    tokens = tower.patches + 1
    rows = images * tokens
    block = [
        *[product(rows, tower.hidden_size, tower.hidden_size)] * 4,
        product(rows, tower.hidden_size, tower.intermediate_size),
        product(rows, tower.intermediate_size, tower.hidden_size),
        Operator(4 * images * tokens**2 * tower.hidden_size, 4 * rows * tower.hidden_size * HALF),
    ]
    return [product(images * tower.patches, 3 * tower.patch_size**2, tower.hidden_size), *block * blocks]


def reduce_operators(tower: TowerShape, images: int, kept: int) -> list[Operator]:
    """PruMerge: keys and the CLS query, CLS attention, kept x all similarities, weighted sums of neighbours.

    Nothing at all where every patch is kept.
    """
    if kept >= tower.patches:
        return []
    patches, hidden = tower.patches, tower.hidden_size
    keys = images * patches * hidden * HALF
    gathered = images * kept * (NEIGHBOURS + 2) * hidden * HALF
    similarities = images * kept * patches * 4  # float32
    return [
        product(images * (patches + 1), hidden, hidden),
        product(images, hidden, hidden),
        Operator(2 * images * patches * hidden, keys),
        Operator(2 * images * kept * patches * hidden, keys + images * kept * hidden * HALF + similarities),
        Operator(2 * images * kept * NEIGHBOURS * hidden, gathered),
    ]


def weight_bytes(shape: Shape, width: float = HALF) -> float:
    """Tower, projector, embeddings, layers and head in device memory."""
    language, tower = shape.language, shape.tower
    embeddings = language.vocab_size * language.hidden_size
    head = 0 if language.tie_word_embeddings else embeddings
    tower_weights = tower.num_hidden_layers * (
        4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    )
    projector = tower.hidden_size * language.hidden_size + language.hidden_size**2
    decoder = decoder_weights(language) + head
    return decoder * width + (embeddings + tower_weights + projector) * HALF


def kv_bytes(language: LanguageShape, tokens: int, batch: int, width: float = HALF) -> float:
    """Cached keys and values of `batch` sequences of `tokens` tokens, `width` bytes a number."""
    return batch * tokens * 2 * language.num_hidden_layers * kv_width(language) * width


def break_even(gpu: Gpu, width: float = HALF) -> float:
    """Tokens in flight (text + visual, times batch) below which weights take longer to read than to use.

    n tokens cost 2 n FLOPs per weight, a weight is read once: n = peak x bytes per weight / (2 bandwidth).
    """
    return gpu.half * width / (2 * gpu.bandwidth)
