"""The GPUs that the roofline computes with: what their makers promise."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a GPU's maker promises: the dense tensor-core rate with float32 accumulation.

    A source marked "halved" prints the rate with structured sparsity.

    Attributes:
        name: short name, what `--gpu` takes.
        memory_gb: device memory, 1e9 bytes.
        bandwidth: of device memory, bytes per second.
        half: FLOP/s in float16, and in bfloat16 where the card has it.
        source: the document the figures are from.
        device_names: words of the name CUDA gives the card, any of which identifies it.
    """

    name: str
    memory_gb: float
    bandwidth: float
    half: float
    source: str
    device_names: tuple[str, ...] = ()


_A100 = "NVIDIA A100 datasheet, 2021"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper 2.1"
_ADA = "NVIDIA Ada GPU Architecture whitepaper 2.1"

GPUS: tuple[Gpu, ...] = tuple(
    Gpu(name, memory, bandwidth * 1e9, half * 1e12, source, names)
    for name, memory, bandwidth, half, source, names in (
        # name, GB, GB/s, fp16 TFLOP/s, source, CUDA's names
        ("V100", 32, 900, 112, "NVIDIA V100 datasheet, 2020 (PCIe)", ("V100-PCIE",)),
        ("V100-SXM2", 32, 900, 125, "NVIDIA V100 datasheet, 2020", ("V100-SXM2",)),
        ("T4", 16, 320, 65, "NVIDIA T4 datasheet", ("Tesla T4",)),
        ("RTX 2080 Ti", 11, 616, 53.8, "NVIDIA Turing whitepaper", ("RTX 2080 Ti",)),
        ("A100-40G", 40, 1555, 312, _A100, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
        ("A100-80G", 80, 2039, 312, _A100, ("A100-SXM4-80GB",)),
        ("A100-80G-PCIe", 80, 1935, 312, _A100, ("A100 80GB PCIe",)),
        ("A30", 24, 933, 165, "NVIDIA A30 datasheet", ("NVIDIA A30",)),
        ("A10", 24, 600, 125, "NVIDIA A10 datasheet", ("NVIDIA A10",)),
        ("A40", 48, 696, 149.7, "NVIDIA A40 datasheet", ("NVIDIA A40",)),
        ("A6000", 48, 768, 154.8, _GA102, ("RTX A6000",)),
        ("RTX 3090", 24, 936, 71, _GA102, ("RTX 3090",)),
        ("L4", 24, 300, 121, "NVIDIA L4 datasheet, halved", ("NVIDIA L4",)),
        ("L40S", 48, 864, 362, "NVIDIA L40S datasheet", ("NVIDIA L40S",)),
        ("RTX 4090", 24, 1008, 165.2, _ADA, ("RTX 4090",)),
        ("RTX 6000 Ada", 48, 960, 364.2, _ADA, ("RTX 6000 Ada",)),
        ("RTX 5090", 32, 1792, 209.5, "NVIDIA RTX Blackwell whitepaper", ("RTX 5090",)),
        ("H100", 80, 3350, 989.4, "NVIDIA H100 whitepaper (SXM5)", ("H100 80GB HBM3",)),
        ("H100-PCIe", 80, 2039, 756, "NVIDIA H100 datasheet, halved", ("H100 PCIe",)),
        ("H200", 141, 4800, 989.4, "NVIDIA H200 datasheet, halved", ("NVIDIA H200",)),
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
