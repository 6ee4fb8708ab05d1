"""Greedy ids of an engine in this process equal those of our own loader and `generate`, in float32."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import greedy_ids, prompt_of

from llava.cli import main
from llava.model.builder import load_pretrained_model
from llava.reducers import ReducerSpecError, available_reducers, build_reducer
from tests.tiny_checkpoints import HIDDEN, edit_json, family, single_safetensors, whole_clip

pytestmark = pytest.mark.usefixtures("server")  # which starts meanwhile
ENGINES = get_context("forkserver")
ENGINES.set_forkserver_preload(
    ["vllm.entrypoints.llm", "vllm.model_executor.models.llama", "llava.model.builder"]
)
"""Each engine gets a process with vLLM imported and nothing else done: the CPU build cannot start a second
engine in one process, nor one beside whatever else has loaded llvmlite."""


def served(path: Path, requests: list[tuple]) -> list[list[int]]:
    """The new ids of all requests, in one batch. A request: prompt, pictures, reducer, what that reads."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(path),
        config_format="llava",
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        gpu_memory_utilization=0.05,
    )
    prompts = [
        {
            "prompt": prompt,
            **({"multi_modal_data": {"image": images}} if images else {}),
            **({"mm_processor_kwargs": {"reducer": reducer, "question": question}} if images else {}),
        }
        for prompt, images, reducer, question in requests
    ]
    done = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done]


NEW = 16
FEW = ("none", "prumerge", "prumerge+", "topk(tokens=6)", "pool(tokens=4)")


def reducers() -> list[str]:
    """A spec of every method there is, with few tokens where it takes a number of them."""
    specs = []
    for name in available_reducers():
        try:
            specs.append(build_reducer(f"{name}(tokens=6)").spec)
        except ReducerSpecError:
            specs.append(name)
    return specs


def make(kind: str, folder):
    """A random checkpoint whose heads are 32 wide (vLLM's attention on a CPU takes no narrower ones)."""
    tiny = family(folder)
    whole_clip(tiny.tower)  # some reducers compare the question with the patches
    edit_json(tiny.full / "config.json", num_attention_heads=2, num_key_value_heads=2)
    if kind == "released":
        return tiny.full
    model = kind.split()[0]
    name = f"Llava{model.title()}ForCausalLM"
    edit_json(tiny.full / "config.json", model_type=f"llava_{model}", architectures=[name])
    if kind == "mistral in llava-hf":
        flags = ["--to", "llava-hf", "--model-path", str(tiny.full), "--out", str(folder / "llava-hf")]
        assert main(["tools", "convert", *flags]) == 0
        return folder / "llava-hf"
    generator = torch.Generator().manual_seed(1)
    parts = [n for n in tiny.language_model if re.search("[qkv]_proj", n)]  # Qwen's have biases
    more = {n.replace("weight", "bias"): torch.randn(HIDDEN, generator=generator) for n in parts}
    more["model.image_newline"] = torch.randn(HIDDEN, generator=generator)
    single_safetensors(tiny.full, {**tiny.language_model, **tiny.projector_weights, **more})
    edit_json(
        tiny.full / "config.json",
        mm_use_im_start_end=True,
        mm_use_im_patch_token=True,
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[112, 56], [56, 112], [112, 112], [168, 56]],
    )
    return tiny.full


@pytest.mark.parametrize(
    "kind", ["released", "mistral in llava-hf", "qwen with tiles, biases and added tokens"]
)
def test_a_random_checkpoint_of_each_kind_with_its_reducers_in_one_batch(kind, tmp_path):
    """The kind "released" with every reducer there is."""
    path = make(kind, tmp_path)
    loaded = load_pretrained_model(path, device="cpu", device_map="cpu", dtype="float32")[:3]
    pictures = [gradient(90, 60, 0), gradient(40, 200, 80), gradient(56, 56, 160)]
    one = prompt_of("vicuna_v1", "<image>\nSay.")
    two = prompt_of("vicuna_v1", "<image>\n<image>\nA?", "B", "c <image>?")
    asked = [(spec, "say it") for spec in FEW]
    if kind == "released":
        asked = [(spec, "say it") for spec in reducers()] + [("cdpruner(tokens=6)", "where is the tree")]
    requests = [(one, [picture], *how) for how in asked for picture in pictures]
    requests += [(two, pictures, spec, "") for spec in ("none", "prumerge")]
    requests += [(prompt_of("vicuna_v1", "Hello"), [], "none", "")]
    with ProcessPoolExecutor(1, mp_context=ENGINES) as pool:
        found = pool.submit(served, path, requests)
        wanted = [
            greedy_ids(loaded, prompt, images, reducer=spec, question=question, new=NEW)
            for prompt, images, spec, question in requests
        ]
        assert found.result() == wanted
    assert len({tuple(ids) for ids in wanted}) > 9  # pictures and reducers matter


def gradient(width: int, height: int, shade: int) -> Image.Image:
    """A picture with something to tell apart in it, always the same."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, Image.new("L", (width, height), shade)))
