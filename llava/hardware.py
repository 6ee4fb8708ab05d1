"""The only place that knows devices: which dtype, which attention kernel, and why.

`plan()` decides; everyone else obeys. The decision itself is `plan_for`, a pure function of what the device
can do, so that a V100 can be reasoned about (and tested) on a laptop.

Torch is imported inside the functions that need it, so that reading a command's flags does not wait for it.
"""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Capability = tuple[int, int]

AMPERE: Capability = (8, 0)
TURING: Capability = (7, 5)
PASCAL: Capability = (6, 0)

FLASH_KERNELS = {
    "flash_attention_2": (AMPERE, "flash_attn"),
    "flash_attention_3": ((9, 0), "flash_attn_interface"),
}
"""Attention kernels that need a compute capability and a package of their own."""

ATTENTIONS = ("sdpa", "eager", "flex_attention", *FLASH_KERNELS)

DTYPE_NAMES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    **{name: name for name in ("float16", "bfloat16", "float32")},
}


class Plan(NamedTuple):
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

    wanted, why = _asked("device", device), "asked for (an argument, or LLAVA_DEVICE)"
    if wanted is None:
        gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
        wanted, why = gpu or "cpu", "torch sees it" if gpu else "torch sees no GPU"
    try:
        where = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"There is no device called {wanted!r}: use cuda, cuda:1, mps or cpu.") from error
    reasons = [f"device {where}: {why}"]

    capability = _capability(where) if where.type == "cuda" else None
    if capability is not None and not _has_kernels_for(capability, torch.cuda.get_arch_list()):
        reasons.append(
            f"warning: this torch ({torch.__version__}) was built without kernels for compute capability "
            f"{_dotted(capability)}; install a build that has them (V100: a CUDA 12.6 build, +cu126)"
        )

    named = _asked("dtype", dtype)
    name = DTYPE_NAMES.get(str(named).removeprefix("torch.").lower())
    if named is not None and name is None:
        raise ValueError(f"{named!s} is not a dtype to run in: use float16, bfloat16 or float32.")
    decided = plan_for(
        where.type,
        capability,
        dtype=name,
        attention=_asked("attention", attention),
        flash_packages=tuple(kernel for kernel, (_, package) in FLASH_KERNELS.items() if _imports(package)),
    )
    return decided._replace(device=where, reasons=(*reasons, *decided.reasons))


def plan_for(
    kind: str,
    capability: Capability | None,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    flash_packages: tuple[str, ...] = (),
) -> Plan:
    """The decision, as a pure function.

    Args:
        kind: torch's device type: "cuda", "cpu", "mps", ...
        capability: CUDA compute capability, None for other kinds.
        dtype: "float16", "bfloat16" or "float32" where the user has decided, else None.
        attention: one of `ATTENTIONS` where the user has decided, else None.
        flash_packages: those of `FLASH_KERNELS` whose package can be imported.

    Raises:
        ValueError: an unknown attention kernel, or one that cannot run on this device in this dtype.
    """
    import torch

    reasons: list[str] = []
    where = f"compute capability {_dotted(capability)}" if capability else kind

    if dtype is None:
        dtype, why = _best_dtype(kind, capability, where)
    else:
        why = "asked for (an argument, or LLAVA_DTYPE)"
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
    reasons.append(f"dtype {dtype}: {why}")

    obstacle = _no_flash_attention("flash_attention_2", where, capability, dtype, flash_packages)
    if attention is None:
        attention, why = ("sdpa", obstacle) if obstacle else ("flash_attention_2", f"{where}, and it imports")
    else:
        why = "asked for (an argument, or LLAVA_ATTENTION)"
        if attention not in ATTENTIONS:
            raise ValueError(
                f"There is no attention kernel {attention!r}: use one of {', '.join(ATTENTIONS)}."
            )
        if attention in FLASH_KERNELS and (
            obstacle := _no_flash_attention(attention, where, capability, dtype, flash_packages)
        ):
            raise ValueError(f"{obstacle}: use sdpa.")
    reasons.append(f"attention {attention}: {why}")

    grad_scaler = dtype == "float16" and kind == "cuda"
    if grad_scaler:
        reasons.append("grad scaler: float16 gradients underflow without loss scaling")
    tf32 = capability is not None and capability >= AMPERE
    if tf32:
        reasons.append(f"tf32: {where} has it, float32 products may use it")
    return Plan(torch.device(kind), getattr(torch, dtype), attention, grad_scaler, tf32, tuple(reasons))


def _best_dtype(kind: str, capability: Capability | None, where: str) -> tuple[str, str]:
    """The dtype, and why."""
    if kind == "mps":
        return "float16", "Apple GPUs compute in float16 natively"
    if capability is None:
        return "float32", f"exact, and fast on every {kind}; some do bfloat16 faster"
    if capability >= AMPERE:
        return "bfloat16", f"{where} has bfloat16 tensor cores"
    if capability >= PASCAL:
        return "float16", f"{where} computes in float16 but not in bfloat16"
    return "float32", f"{where} has no float16 arithmetic"


def _no_flash_attention(
    kernel: str, where: str, capability: Capability | None, dtype: str, flash_packages: tuple[str, ...]
) -> str:
    """Why a kernel of `FLASH_KERNELS` cannot run; "" if it can."""
    needed, package = FLASH_KERNELS[kernel]
    if capability is None or capability < needed:
        return f"{kernel} needs CUDA and compute capability {_dotted(needed)}, this is {where}"
    if dtype == "float32":
        return f"{kernel} computes in float16 and bfloat16 only, not in float32"
    if kernel not in flash_packages:
        return (
            f"the package {package} of {kernel} cannot be imported here (its README says how to install it)"
        )
    return ""


def supports_llm_int8(device: str | torch.device | None = None) -> bool:
    """Whether bitsandbytes' LLM.int8 (`load_8bit`) runs on the device; 4-bit runs on all of them.

    It needs int8 tensor cores on CUDA (7.5, so not a V100), and has a path for CPUs.

    Raises:
        ValueError: the device is not there.
    """
    where = plan(device).device
    return where.type == "cpu" or (where.type == "cuda" and _capability(where) >= TURING)


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


def _asked(name: str, argument: Any) -> Any:
    """What the user chose, by argument or environment; None: nothing."""
    for value in (argument, os.environ.get(f"LLAVA_{name.upper()}")):
        if value not in (None, "", "auto"):
            return value
    return None


def _capability(device: torch.device) -> Capability:
    import torch

    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The device {str(device)!r} was asked for, but torch ({torch.__version__}) cannot use it: "
            f"{str(error).partition(chr(10))[0].rstrip('.')}. "
            "Use cpu, or install a CUDA build of torch and check nvidia-smi."
        ) from error


def _has_kernels_for(capability: Capability, architectures: list[str]) -> bool:
    """Whether a torch build runs on a GPU: machine code of the same major version, or PTX not newer.

    Args:
        architectures: torch.cuda.get_arch_list(), such as ["sm_80", "sm_90a", "compute_120"]; an empty list
            (a CPU build, where the question does not arise) counts as yes.
    """
    for architecture in architectures:
        kind, _, digits = architecture.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not architectures


def _imports(package: str) -> bool:
    """Whether the package is there and loads: a flash-attn built for another torch is there and does not."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError):
        return False
    return True


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
