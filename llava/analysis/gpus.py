"""The GPUs that the roofline computes with: what their makers promise."""

import re
from dataclasses import dataclass

AMPERE = (8, 0)
"""The compute capability from which on there is bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU's maker promises: dense tensor-core rates with float32 accumulation.

    A source marked "halved" prints the rates with structured sparsity.

    Attributes:
        name: short name, what `--gpu` takes.
        capability: CUDA compute capability.
        memory_gb: device memory, 1e9 bytes.
        bandwidth: of device memory, bytes per second.
        half: FLOP/s in float16, and in bfloat16 where the capability has it.
        int8: integer operations per second (tensor cores; V100: dp4a).
        single: FLOP/s in float32, without TF32.
        source: the document the figures are from.
        device_names: words of the name CUDA gives the card, any of which identifies it.
    """

    name: str
    capability: tuple[int, int]
    memory_gb: float
    bandwidth: float
    half: float
    int8: float
    single: float
    source: str
    device_names: tuple[str, ...] = ()


GIGA, TERA = 1e9, 1e12

_A100 = "NVIDIA A100 datasheet, 2021"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper 2.1"
_ADA = "NVIDIA Ada GPU Architecture whitepaper 2.1"

GPUS: tuple[Gpu, ...] = tuple(
    Gpu(name, capability, memory, bandwidth * GIGA, half * TERA, int8 * TERA, single * TERA, source, names)
    for name, capability, memory, bandwidth, half, int8, single, source, names in (
        # name, capability, GB, GB/s, fp16 T, int8 T, fp32 T, source, CUDA's names
        ("V100", (7, 0), 32, 900, 112, 56, 14, "NVIDIA V100 datasheet, 2020 (PCIe)", ("V100-PCIE",)),
        ("V100-SXM2", (7, 0), 32, 900, 125, 62.8, 15.7, "NVIDIA V100 datasheet, 2020", ("V100-SXM2",)),
        ("T4", (7, 5), 16, 320, 65, 130, 8.1, "NVIDIA T4 datasheet", ("Tesla T4",)),
        ("RTX 2080 Ti", (7, 5), 11, 616, 53.8, 215.2, 13.4, "NVIDIA Turing whitepaper", ("RTX 2080 Ti",)),
        ("A100-40G", (8, 0), 40, 1555, 312, 624, 19.5, _A100, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
        ("A100-80G", (8, 0), 80, 2039, 312, 624, 19.5, _A100, ("A100-SXM4-80GB",)),
        ("A100-80G-PCIe", (8, 0), 80, 1935, 312, 624, 19.5, _A100, ("A100 80GB PCIe",)),
        ("A30", (8, 0), 24, 933, 165, 330, 10.3, "NVIDIA A30 datasheet", ("NVIDIA A30",)),
        ("A10", (8, 6), 24, 600, 125, 250, 31.2, "NVIDIA A10 datasheet", ("NVIDIA A10",)),
        ("A40", (8, 6), 48, 696, 149.7, 299.3, 37.4, "NVIDIA A40 datasheet", ("NVIDIA A40",)),
        ("A6000", (8, 6), 48, 768, 154.8, 309.7, 38.7, _GA102, ("RTX A6000",)),
        ("RTX 3090", (8, 6), 24, 936, 71, 284, 35.6, _GA102, ("RTX 3090",)),
        ("L4", (8, 9), 24, 300, 121, 242.5, 30.3, "NVIDIA L4 datasheet, halved", ("NVIDIA L4",)),
        ("L40S", (8, 9), 48, 864, 362, 733, 91.6, "NVIDIA L40S datasheet", ("NVIDIA L40S",)),
        ("RTX 4090", (8, 9), 24, 1008, 165.2, 660.6, 82.6, _ADA, ("RTX 4090",)),
        ("RTX 6000 Ada", (8, 9), 48, 960, 364.2, 728.5, 91.1, _ADA, ("RTX 6000 Ada",)),
        ("RTX 5090", (12, 0), 32, 1792, 209.5, 838, 104.8, "NVIDIA RTX Blackwell whitepaper", ("RTX 5090",)),
        ("H100", (9, 0), 80, 3350, 989.4, 1978.9, 66.9, "NVIDIA H100 whitepaper (SXM5)", ("H100 80GB HBM3",)),
        ("H100-PCIe", (9, 0), 80, 2039, 756, 1513, 51.2, "NVIDIA H100 datasheet, halved", ("H100 PCIe",)),
        ("H200", (9, 0), 141, 4800, 989.4, 1978.9, 66.9, "NVIDIA H200 datasheet, halved", ("NVIDIA H200",)),
    )
)


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`: a name of the table in any spelling ("a100-80g", "RTX4090"), or CUDA's own.

    Raises:
        ValueError: not in the table; the message lists what is.
    """

    def letters(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    for gpu in GPUS:
        if letters(name) == letters(gpu.name):
            return gpu
    for gpu in GPUS:
        if any(re.search(rf"\b{re.escape(part)}\b", name, re.IGNORECASE) for part in gpu.device_names):
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise ValueError(f"There is no GPU {name!r} in the table: use one of {known}.")
