"""The efficiency table of the PruMerge paper, recomputed cell by cell.

The paper calls it "Tesla V100, roofline model". It is the accounting of LLM-Viewer as it stood in March 2024,
fed with sequence lengths 700 and 70. `compute()` repeats that accounting as it is, oddities included, so that
its numbers can be checked; what it flatters is listed in `REMARKS`, and `llava.analysis.roofline` has the
corrected model.
"""

import itertools
from dataclasses import dataclass

from llava.analysis.shapes import SHAPES, LanguageShape, linears

BANDWIDTH = 900e9
"""Bytes per second the table takes for a V100."""

RATES = {"fp16": 112e12, "int4": 62e12}
"""Operations per second. There is no INT4 rate on a V100: the table uses its INT8 rate."""

BYTES = {"fp16": 2.0, "int4": 0.5}
"""Of every weight, activation and cached key or value: the table's INT4 is w4a4kv4."""

LENGTHS = {"full": 700, "prumerge": 70}
"""Tokens in prefill. The text says 576 + 40 and 40 + 40; those lengths do not give these numbers."""


@dataclass(frozen=True)
class Row:
    """One row of the table: operations (1e12), prefill time, bytes moved and activations written (1e9)."""

    row: str
    tflops: float
    prefill_ms: float
    memory_gb: float
    activation_gb: float


PRINTED = {
    "7b-fp16-full": ("9.3", "88.6", "23.3", "4.60"),
    "7b-fp16-prumerge": ("0.91", "15.3", "13.7", "0.28"),
    "7b-int4-full": ("2.3", "151.6", "5.9", "1.20"),
    "7b-int4-prumerge": ("0.28", "14.9", "3.5", "0.07"),
    "13b-fp16-full": ("18.2", "170.5", "41.6", "7.30"),
    "13b-fp16-prumerge": ("1.80", "29.5", "26.6", "0.44"),
    "13b-int4-full": ("4.6", "294.9", "10.5", "1.80"),
    "13b-int4-prumerge": ("0.45", "29.0", "6.8", "0.11"),
}
"""What the paper prints: TFLOPs, prefill ms, total memory GB, storing activation GB."""

REMARKS = (
    "7b-int4-prumerge, FLOPs: the paper prints 0.28 where its own rule (FP16 divided by 4) gives "
    "0.91 / 4 = 0.23. Very likely a slip: 0.28 is also the activation figure two rows above.",
    "13b-int4-full, FLOPs: 4.6 is 18.2 / 4 = 4.55 rounded once more; unrounded it is 4.54.",
    "The lengths are 700 and 70, a ratio of 10. The text's own counts, 576 + 40 against 40 + 40 tokens, have "
    "a ratio of 7.7 and give 7.9 times fewer operations.",
    '"Total memory" is bytes moved during prefill, not memory occupied. That hardly falls: the weights stay, '
    "the KV cache shrinks from 0.37 to 0.04 GB (7B, FP16).",
    "INT4 is w4a4kv4 at the INT8 rate, so it looks slower than FP16. Weight-only 4 bits (w4a16) is not.",
    "The vision tower and the merge are not counted. The tower is not reduced, so it bounds the gain.",
    "Attention is not fused and writes its score matrix: long sequences look worse than they run.",
)


@dataclass(frozen=True)
class _Operator:
    """Operations; bytes read, written as activations, and written into the KV cache."""

    operations: float
    read: float
    written: float
    cached: float = 0.0

    @property
    def moved(self) -> float:
        return self.read + self.written + self.cached


def compute() -> list[Row]:
    """The eight rows, in the paper's order."""
    rows = []
    for model, precision, (name, length) in itertools.product(("7b", "13b"), RATES, LENGTHS.items()):
        operators = _operators(SHAPES[model].language, length, BYTES[precision])
        operations = sum(each.operations for each in operators)
        seconds = sum(max(op.operations / RATES[precision], op.moved / BANDWIDTH) for op in operators)
        rows.append(
            Row(
                row=f"{model}-{precision}-{name}",
                # the INT4 rows are printed divided by 4
                tflops=operations * BYTES[precision] / BYTES["fp16"] / 1e12,
                prefill_ms=seconds * 1e3,
                memory_gb=sum(each.moved for each in operators) / 1e9,
                activation_gb=sum(each.written for each in operators) / 1e9,
            )
        )
    return rows


def _operators(language: LanguageShape, length: int, width: float) -> list[_Operator]:
    """All decoder layers at batch 1, attention over the full square, and lm_head of one position."""
    hidden, hidden_row = language.hidden_size, length * language.hidden_size * width
    scores = length * length * language.num_attention_heads * width
    attention = 2 * length * length * hidden

    products = []
    for name, inputs, outputs in linears(language):
        read, written = (inputs * outputs + inputs * length) * width, outputs * length * width
        # The KV cache is no activation here.
        results = (0.0, written) if name in ("k_proj", "v_proj") else (written, 0.0)
        products.append(_Operator(2 * inputs * outputs * length, read, *results))
    norm = _Operator(7 * length * hidden, hidden_row, hidden_row)
    add = _Operator(length * hidden, hidden_row, hidden_row)  # sic: reads one operand
    layer = [
        *products,
        _Operator(attention, 2 * hidden_row, scores),  # q k: reads K twice and no Q
        _Operator(5 * length * length * language.num_attention_heads, scores, scores),
        _Operator(attention, scores + hidden_row, hidden_row),
        *(norm, norm, add, add),
        _Operator(2 * length * hidden, 2 * hidden_row, hidden_row),
    ]
    # Sic: one operation per multiply-add, one byte per weight in any precision.
    weights = hidden * language.vocab_size
    head = _Operator(weights, weights + hidden * width, language.vocab_size * width)
    return [*layer * language.num_hidden_layers, head]
