"""The hardware plan: every kind of device, with and without the user's say, on a machine that has none."""

import pytest
import torch

from llava import hardware

VOLTA, TURING, AMPERE, HOPPER = (7, 0), (7, 5), (8, 0), (9, 0)
FLASH = ("flash_attention_2",)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("LLAVA_DEVICE", "LLAVA_DTYPE", "LLAVA_ATTENTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("capability", "dtype", "attention", "scaler", "tf32"),
    [
        ((5, 2), "float32", "sdpa", False, False),
        ((6, 0), "float16", "sdpa", True, False),
        (VOLTA, "float16", "sdpa", True, False),
        (TURING, "float16", "sdpa", True, False),
        (AMPERE, "bfloat16", "flash_attention_2", False, True),
        ((8, 9), "bfloat16", "flash_attention_2", False, True),
        (HOPPER, "bfloat16", "flash_attention_2", False, True),
        ((12, 0), "bfloat16", "flash_attention_2", False, True),
    ],
)
def test_by_capability(capability, dtype, attention, scaler, tf32):
    decision = hardware.plan_for("cuda", capability, flash_packages=FLASH)
    assert (decision.dtype, decision.attention) == (getattr(torch, dtype), attention)
    assert (decision.grad_scaler, decision.tf32) == (scaler, tf32)
    assert all(isinstance(reason, str) and reason for reason in decision.reasons)


def test_flash_attention_only_where_the_package_imports():
    assert hardware.plan_for("cuda", AMPERE).attention == "sdpa"


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "float32"), ("mps", "float16"), ("xpu", "float32")])
def test_without_cuda(kind, dtype):
    decision = hardware.plan_for(kind, None, flash_packages=FLASH)
    assert (decision.dtype, decision.attention) == (getattr(torch, dtype), "sdpa")
    assert not decision.grad_scaler


def test_bfloat16_on_volta_is_obeyed_with_a_warning():
    decision = hardware.plan_for("cuda", VOLTA, dtype="bfloat16")
    assert decision.dtype is torch.bfloat16
    assert not decision.grad_scaler
    assert any(reason.startswith("warning:") and "7.0" in reason for reason in decision.reasons)


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "attention", "packages", "words"),
    [
        ("cuda", VOLTA, None, "flash_attention_2", FLASH, "8.0"),
        ("cuda", AMPERE, None, "flash_attention_3", ("flash_attention_3",), "9.0"),
        ("cuda", AMPERE, None, "flash_attention_2", (), "flash_attn"),
        ("cuda", AMPERE, "float32", "flash_attention_2", FLASH, "float32"),
        ("cpu", None, None, "flash_attention_2", FLASH, "CUDA"),
        ("cpu", None, None, "flash", FLASH, "sdpa"),
    ],
)
def test_impossible_attention_is_refused(kind, capability, dtype, attention, packages, words):
    with pytest.raises(ValueError, match=words):
        hardware.plan_for(kind, capability, dtype=dtype, attention=attention, flash_packages=packages)


def test_eager_can_be_asked_for_anywhere():
    assert hardware.plan_for("cuda", VOLTA, attention="eager").attention == "eager"


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Makes torch report a GPU of some compute capability."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        # It says True for a V100, too: whoever asks it is wrong.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    return pretend


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", torch.device("cuda")])
def test_plan_on_a_v100(pretend_cuda, device):
    pretend_cuda(VOLTA)
    plan = hardware.plan(device)
    assert plan.device.type == "cuda"
    assert (plan.dtype, plan.attention, plan.grad_scaler, plan.tf32) == (torch.float16, "sdpa", True, False)
    assert not hardware.supports_llm_int8(device)
    assert not plan.warnings


def test_llm_int8_needs_int8_tensor_cores_or_a_cpu(pretend_cuda):
    pretend_cuda(TURING)
    assert hardware.supports_llm_int8("cuda") and hardware.supports_llm_int8("cpu")
    assert not hardware.supports_llm_int8("mps")


def test_an_argument_wins_over_the_environment_and_that_over_the_rule(pretend_cuda, monkeypatch):
    pretend_cuda(AMPERE)
    assert hardware.plan().dtype is torch.bfloat16
    monkeypatch.setenv("LLAVA_DTYPE", "fp16")
    monkeypatch.setenv("LLAVA_ATTENTION", "eager")
    plan = hardware.plan()
    assert (plan.dtype, plan.attention, plan.grad_scaler) == (torch.float16, "eager", True)
    assert any("LLAVA_DTYPE" in reason for reason in plan.reasons)
    plan = hardware.plan(dtype=torch.float32, attention="sdpa")
    assert (plan.dtype, plan.attention) == (torch.float32, "sdpa")
    monkeypatch.setenv("LLAVA_DEVICE", "cpu")
    monkeypatch.delenv("LLAVA_DTYPE")
    assert (hardware.plan().device.type, hardware.plan().dtype) == ("cpu", torch.float32)
    assert hardware.plan("cuda").device.type == "cuda"


def test_auto_and_empty_values_are_undecided(monkeypatch):
    monkeypatch.setenv("LLAVA_DTYPE", "auto")
    monkeypatch.setenv("LLAVA_ATTENTION", "")
    plan = hardware.plan("cpu", dtype="auto", attention="auto")
    assert (plan.dtype, plan.attention) == (torch.float32, "sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'cuda:3'"):
        hardware.plan("cuda:3")


@pytest.mark.parametrize(("device", "dtype"), [("gpu0", None), ("cpu", "int3"), ("cpu", torch.int64)])
def test_unknown_names_are_refused(device, dtype):
    with pytest.raises(ValueError, match="use"):
        hardware.plan(device, dtype=dtype)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ([], VOLTA, True),
        (["sm_70", "sm_80"], VOLTA, True),
        (["sm_75", "sm_80", "sm_90", "sm_120"], VOLTA, False),
        (["sm_80"], (8, 6), True),
        (["sm_86"], AMPERE, False),
        (["sm_90a"], HOPPER, True),
        (["sm_80", "compute_80"], HOPPER, True),
        (["sm_100", "sm_120"], (12, 0), True),
    ],
)
def test_whether_a_torch_build_has_kernels(architectures, capability, runs, pretend_cuda, monkeypatch):
    pretend_cuda(capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    assert bool(hardware.plan("cuda").warnings) is not runs
