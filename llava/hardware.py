"""The only place that knows devices: which dtype, which attention kernel, and why.

`plan()` decides; everyone else obeys. The decision itself is `plan_for`, a pure function of what the device
can do, so that a V100 can be reasoned about (and tested) on a laptop. The table of GPUs at the end is what
the roofline computes with.

Torch is imported inside the functions that need it: the table is read by commands that never load torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Capability = tuple[int, int]

AMPERE: Capability = (8, 0)
TURING: Capability = (7, 5)
PASCAL: Capability = (6, 0)

FLASH_KERNELS = {"flash_attention_2": AMPERE, "flash_attention_3": (9, 0)}
"""Attention kernels that come as a package of their own: the compute capability each starts at."""

FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}

ATTENTIONS = ("sdpa", "eager", "flex_attention", *FLASH_KERNELS)

DTYPE_NAMES = {
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}


@dataclass(frozen=True)
class Plan:
    """How to run on one device.

    Attributes:
        device: where.
        dtype: of weights and activations.
        attention: the `attn_implementation` to hand to transformers.
        grad_scaler: training in this dtype needs loss scaling (float16 on a GPU).
        tf32: float32 products may use TensorFloat-32 (Ampere and newer).
        reasons: one sentence per decision; those that begin with "warning:" deserve to be shown.
    """

    device: torch.device
    dtype: torch.dtype
    attention: str
    grad_scaler: bool
    tf32: bool
    reasons: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(reason for reason in self.reasons if reason.startswith("warning:"))


def plan(
    device: str | torch.device | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
) -> Plan:
    """Decide for `device` (default: the first of CUDA, MPS, CPU that is there).

    An argument wins over its environment variable (LLAVA_DEVICE, LLAVA_DTYPE, LLAVA_ATTENTION), which wins
    over the decision by compute capability; "auto" or an empty value means undecided.

    Raises:
        ValueError: an unknown name, a device that is not there, or a request the device cannot fulfil.
    """
    import torch

    reasons: list[str] = []
    device, why = _choose("device", device, os.environ)
    if device is None:
        device, why = _detect_device()
    reasons.append(f"device {device}: {why}")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"There is no device called {device!r}: use cuda, cuda:1, mps or cpu.") from error

    capability = _capability(device) if device.type == "cuda" else None
    if capability is not None and not _has_kernels_for(capability, torch.cuda.get_arch_list()):
        reasons.append(
            f"warning: this torch ({torch.__version__}) was built without kernels for compute capability "
            f"{_dotted(capability)}; install a build that has them (V100: a CUDA 12.6 build, +cu126)"
        )

    dtype, dtype_why = _choose("dtype", dtype, os.environ)
    attention, attention_why = _choose("attention", attention, os.environ)
    decided = plan_for(
        device.type,
        capability,
        dtype=None if dtype is None else _dtype_name(dtype),
        attention=attention,
        dtype_why=dtype_why,
        attention_why=attention_why,
        flash_packages=tuple(name for name, package in FLASH_PACKAGES.items() if _imports(package)),
    )
    return Plan(
        device=device,
        dtype=getattr(torch, decided.dtype),
        attention=decided.attention,
        grad_scaler=decided.grad_scaler,
        tf32=decided.tf32,
        reasons=(*reasons, *decided.reasons),
    )


@dataclass(frozen=True)
class Decision:
    """What `plan_for` decides; `Plan` with the dtype as a name and without the device."""

    dtype: str
    attention: str
    grad_scaler: bool
    tf32: bool
    reasons: tuple[str, ...]


def plan_for(
    kind: str,
    capability: Capability | None,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    dtype_why: str = "asked for",
    attention_why: str = "asked for",
    flash_packages: tuple[str, ...] = (),
) -> Decision:
    """The decision, as a pure function.

    Args:
        kind: torch's device type: "cuda", "cpu", "mps", ...
        capability: CUDA compute capability, None for other kinds.
        dtype: "float16", "bfloat16" or "float32" where the user has decided, else None.
        attention: one of `ATTENTIONS` where the user has decided, else None.
        dtype_why, attention_why: how the user said so, for the reasons.
        flash_packages: those of `FLASH_KERNELS` whose package can be imported.

    Raises:
        ValueError: an unknown attention kernel, or one that cannot run on this device in this dtype.
    """
    reasons: list[str] = []
    where = f"compute capability {_dotted(capability)}" if capability else kind

    best_dtype, why = _best_dtype(kind, capability)
    if dtype is None:
        dtype = best_dtype
        reasons.append(f"dtype {dtype}: {why}")
    else:
        reasons.append(f"dtype {dtype}: {dtype_why}")
        if dtype == "bfloat16" and capability and capability < AMPERE:
            # torch.cuda.is_bf16_supported() says True here, because it counts emulation.
            reasons.append(
                f"warning: {where} has no bfloat16 arithmetic; it is emulated and slow, "
                "and sdpa has no memory-efficient kernel for it; float16 is the right choice"
            )
        if dtype == "float16" and kind == "cpu":
            reasons.append(
                "warning: float16 on a CPU is slow and loses precision; float32 is the right choice"
            )

    if attention is None:
        attention, why = _best_attention(capability, dtype, flash_packages)
        reasons.append(f"attention {attention}: {why}")
    else:
        _check_attention(attention, kind, capability, dtype, flash_packages)
        reasons.append(f"attention {attention}: {attention_why}")

    grad_scaler = dtype == "float16" and kind == "cuda"
    if grad_scaler:
        reasons.append("grad scaler: float16 gradients underflow without loss scaling")
    tf32 = capability is not None and capability >= AMPERE
    if tf32:
        reasons.append(f"tf32: {where} has it, float32 products may use it")
    return Decision(dtype, attention, grad_scaler, tf32, tuple(reasons))


def supports_llm_int8(device: str | torch.device | None = None) -> bool:
    """Whether bitsandbytes' LLM.int8 (`load_8bit`) runs on the device; 4-bit runs on all of them.

    Raises:
        ValueError: the device is not there.
    """
    device = plan(device).device
    return llm_int8_for(device.type, _capability(device) if device.type == "cuda" else None)


def llm_int8_for(kind: str, capability: Capability | None) -> bool:
    """LLM.int8 needs int8 tensor cores on CUDA (7.5, so not a V100); bitsandbytes has a CPU path for it."""
    return kind == "cpu" or (capability is not None and capability >= TURING)


def device_name(device: torch.device) -> str:
    """The model of a device, as reports name it."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def cpu_name() -> str:
    """The processor's model as the system tells it; its architecture where it tells none."""
    info = Path("/proc/cpuinfo")  # Linux, where platform.processor() is mostly empty
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _best_dtype(kind: str, capability: Capability | None) -> tuple[str, str]:
    if kind == "mps":
        return "float16", "Apple GPUs compute in float16 natively"
    if capability is None:
        return "float32", f"exact, and fast on every {kind}; some do bfloat16 faster"
    if capability >= AMPERE:
        return "bfloat16", f"compute capability {_dotted(capability)} has bfloat16 tensor cores"
    if capability >= PASCAL:
        return "float16", f"compute capability {_dotted(capability)} computes in float16 but not in bfloat16"
    return "float32", f"compute capability {_dotted(capability)} has no float16 arithmetic"


def _best_attention(
    capability: Capability | None, dtype: str, flash_packages: tuple[str, ...]
) -> tuple[str, str]:
    if capability is None:
        return "sdpa", "flash-attn is for CUDA only"
    if capability < AMPERE:
        return "sdpa", f"flash-attn starts at compute capability 8.0, this is {_dotted(capability)}"
    if dtype == "float32":
        return "sdpa", "flash-attn computes in float16 and bfloat16 only"
    if "flash_attention_2" not in flash_packages:
        return "sdpa", "flash-attn cannot be imported here; sdpa has its own flash kernel"
    return "flash_attention_2", f"compute capability {_dotted(capability)} and flash-attn imports"


def _check_attention(
    attention: str, kind: str, capability: Capability | None, dtype: str, flash_packages: tuple[str, ...]
) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"There is no attention kernel {attention!r}: use one of {', '.join(ATTENTIONS)}.")
    needed = FLASH_KERNELS.get(attention)
    if needed is None:
        return
    if capability is None:
        raise ValueError(f"{attention} runs on CUDA only, this is {kind}: use sdpa.")
    if capability < needed:
        raise ValueError(
            f"{attention} needs compute capability {_dotted(needed)}, this GPU has {_dotted(capability)}: "
            "use sdpa."
        )
    if dtype == "float32":
        raise ValueError(f"{attention} computes in float16 and bfloat16 only, not float32: use sdpa.")
    if attention not in flash_packages:
        raise ValueError(
            f"{attention} was asked for, but the package {FLASH_PACKAGES[attention]} cannot be imported: "
            "install it (flash-attn's README says how) or use sdpa."
        )


def _choose(name: str, argument: T | None, environment: Mapping[str, str]) -> tuple[T | str | None, str]:
    """The user's choice and how it was made, or (None, "")."""
    variable = f"LLAVA_{name.upper()}"
    if argument not in (None, "", "auto"):
        return argument, "asked for"
    if (value := environment.get(variable, "")) not in ("", "auto"):
        return value, f"{variable} is set"
    return None, ""


def _detect_device() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return "cuda", "torch sees a CUDA device"
    if torch.backends.mps.is_available():
        return "mps", "torch sees an Apple GPU"
    return "cpu", "torch sees no GPU"


def _capability(device: torch.device) -> Capability:
    import torch

    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The device {str(device)!r} was asked for, but torch ({torch.__version__}) cannot use it: "
            f"{_first_line(error)} Use cpu, or install a CUDA build of torch and check nvidia-smi."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _has_kernels_for(capability: Capability, architectures: list[str]) -> bool:
    """Whether a torch build runs on a GPU: machine code of the same major version, or PTX not newer.

    Args:
        architectures: torch.cuda.get_arch_list(), such as ["sm_80", "sm_90a", "compute_120"]; an empty list
            (a CPU build, where the question does not arise) counts as yes.
    """
    if not architectures:
        return True
    for architecture in architectures:
        kind, _, digits = architecture.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return True
        if kind == "compute" and built <= capability:
            return True
    return False


def _imports(package: str) -> bool:
    """Whether the package is there and loads: a flash-attn built for another torch is there and does not."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except (ImportError, OSError):
        return False
    return True


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.").lower()
    if name not in DTYPE_NAMES:
        raise ValueError(f"{dtype!s} is not a dtype to run in: use float16, bfloat16 or float32.")
    return DTYPE_NAMES[name]


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


# The device table --------------------------------------------------------------------------------


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
    capability: Capability
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
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted == _plain(gpu.name):
            return gpu
    for gpu in GPUS:
        if any(re.search(rf"\b{re.escape(part)}\b", name, re.IGNORECASE) for part in gpu.device_names):
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise ValueError(f"There is no GPU {name!r} in the table: use one of {known}.")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
