"""Checkpoints of every kind, made anew in a test: tiny random weights, a letters-only tokenizer.

`family(folder)` writes them with torch.save, safetensors and json alone, under the names the formats have, so
that what reads them is tested against the formats and not against what writes them here.
"""

import json
import shutil
import string
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

IMAGE_SIZE, PATCH = 56, 14
VISUAL_TOKENS = (IMAGE_SIZE // PATCH) ** 2
HIDDEN, TOWER_HIDDEN, RANK = 64, 32, 4
PIECE = 12  # what the text model of `whole_clip` reads at a time

TOWER = {
    "hidden_size": TOWER_HIDDEN,
    "image_size": IMAGE_SIZE,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": PATCH,
    "projection_dim": 16,
}

LANGUAGE_MODEL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

LLAVA = {
    "image_aspect_ratio": "pad",
    "mm_hidden_size": TOWER_HIDDEN,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "towers/clip-tiny",
}


@dataclass(frozen=True)
class Family:
    """Directories of one family of checkpoints; all share tower, base and projector."""

    root: Path
    tower: Path
    base: Path
    full: Path
    lora: Path
    projector: Path
    vocab_size: int
    language_model: dict[str, torch.Tensor]
    projector_weights: dict[str, torch.Tensor]

    def copied_to(self, root: Path) -> "Family":
        """A copy, for a test to change."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        paths = {name: value for name, value in vars(self).items() if isinstance(value, Path)}
        return replace(self, **{name: root / path.relative_to(self.root) for name, path in paths.items()})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON file; a value of None removes the field."""
    content = {**json.loads(path.read_text()), **changes}
    write_json(path, {name: value for name, value in content.items() if value is not None})


def write_tokenizer(directory: Path) -> int:
    """A sentencepiece-like tokenizer of bytes and letters; returns its length."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
        legacy=False,
    )
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


def family(root: Path, seed: int = 0) -> Family:
    """tower, base, full, lora, projector under `root`; the tower's name is relative to `root`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tower, base, full = root / "towers/clip-tiny", root / "base-tiny", root / "llava-tiny"
    lora, projector = root / "llava-tiny-lora", root / "llava-tiny-pretrain"
    for directory in (tower, base, full, lora, projector):
        directory.mkdir(parents=True)

    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    clip = CLIPModel(
        CLIPConfig(
            vision_config=TOWER,
            text_config={**text, "vocab_size": 32, "projection_dim": 16},
            projection_dim=16,
        )
    )
    torch.save(
        {name: noise(*t.shape) if t.ndim else t for name, t in clip.state_dict().items()},
        tower / "pytorch_model.bin",
    )
    clip.config.save_pretrained(tower)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(tower)

    vocab_size = write_tokenizer(base)
    write_tokenizer(full)
    model_config = {**LANGUAGE_MODEL, "vocab_size": vocab_size}
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(LlamaConfig(**model_config)).state_dict().items()}
    language_model = {n: torch.ones(s) if "norm" in n else noise(*s) for n, s in shapes.items()}
    projector_weights = {
        "model.mm_projector.0.weight": noise(HIDDEN, TOWER_HIDDEN),
        "model.mm_projector.0.bias": noise(HIDDEN),
        "model.mm_projector.2.weight": noise(HIDDEN, HIDDEN),
        "model.mm_projector.2.bias": noise(HIDDEN),
    }

    torch.save(language_model, base / "pytorch_model.bin")
    write_json(
        base / "config.json", {**model_config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )
    write_json(
        base / "generation_config.json",
        {"temperature": 0.9, "top_p": 0.6, "max_length": 512, "eos_token_id": 2},
    )

    # As released: two .bin shards, model_type "llava", no tower keys, old buffers here and there.
    llava_config = {
        **model_config,
        **LLAVA,
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
    }
    whole = {**language_model, **projector_weights}
    names = sorted(whole)
    halves = {
        "pytorch_model-00001-of-00002.bin": {n: whole[n] for n in names[: len(names) // 2]},
        "pytorch_model-00002-of-00002.bin": {n: whole[n] for n in names[len(names) // 2 :]},
    }
    halves["pytorch_model-00001-of-00002.bin"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = noise(8)
    for file, tensors in halves.items():
        torch.save(tensors, full / file)
    weight_map = {name: file for file, tensors in halves.items() for name in tensors}
    write_json(full / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(full / "config.json", llava_config)

    targets = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN)}
    adapter = {}
    for layer in range(LANGUAGE_MODEL["num_hidden_layers"]):
        for target, (rows, columns) in targets.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            adapter[f"{name}.lora_A.weight"] = noise(RANK, columns)
            adapter[f"{name}.lora_B.weight"] = noise(rows, RANK)
    torch.save(adapter, lora / "adapter_model.bin")
    torch.save(
        {f"base_model.model.{n}": t for n, t in projector_weights.items()}, lora / "non_lora_trainables.bin"
    )
    write_json(
        lora / "adapter_config.json",
        {
            "base_model_name_or_path": "someone/base-tiny",
            "bias": "none",
            "lora_alpha": 8,
            "lora_dropout": 0.05,
            "peft_type": "LORA",
            "r": RANK,
            "target_modules": sorted(targets),
            "task_type": "CAUSAL_LM",
        },
    )
    write_json(lora / "config.json", {**llava_config, "architectures": ["LlamaForCausalLM"]})

    torch.save(projector_weights, projector / "mm_projector.bin")
    write_json(
        projector / "config.json",
        {
            **llava_config,
            "architectures": ["LlamaForCausalLM"],
            "_name_or_path": "someone/base-tiny",
            "model_type": "llava_llama",
        },
    )
    return Family(root, tower, base, full, lora, projector, vocab_size, language_model, projector_weights)


def single_safetensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a directory's weights by one model.safetensors."""
    for file in [*directory.glob("pytorch_model*"), *directory.glob("model*.safetensors*")]:
        file.unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )


def whole_clip(tower: Path) -> None:
    """Makes the tower of a family a whole CLIP: text model, projections, a tokenizer of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz.,?!0123456789"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tower)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text |= {"vocab_size": len(pieces), "max_position_embeddings": PIECE, "projection_dim": 16}
    text |= {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=16))
    for weight in clip.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    (tower / "pytorch_model.bin").unlink()
    processor = (tower / "preprocessor_config.json").read_text()
    clip.save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text(processor)
