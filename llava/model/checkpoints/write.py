"""Writing checkpoints: a directory is the old checkpoint or the new one, never a mixture."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from llava.files import replacing_file, write_json
from llava.model.checkpoints.inspect import EXTRA_FILES, PROJECTOR_FILES
from llava.model.checkpoints.names import canonical_name


@contextmanager
def replacing(out: str | Path) -> Iterator[Path]:
    """A new directory beside `out` to write into; at the end its files become `out`'s.

    A new `out` appears by one rename. Into an existing one (a run's directory, with checkpoint-N inside) the
    files are moved, config.json last, after weights of the same kind under other names are gone: a directory
    without config.json is refused on reading, one with it is complete. On an error nothing of `out` changes.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(fresh, ignore_errors=True)  # of a process of this number that was killed
    fresh.mkdir()
    try:
        yield fresh
        for (
            file
        ) in fresh.iterdir():  # safetensors' files are private; others may read what the user lets them
            file.chmod(fresh.stat().st_mode & 0o666)
        if not out.exists():
            os.replace(fresh, out)
            return
        new = {file.name for file in fresh.iterdir()}
        if "config.json" in new:
            (out / "config.json").unlink(missing_ok=True)
        if any(_is_model_weight(name) for name in new):
            for file in out.iterdir():
                if _is_model_weight(file.name) and file.name not in new:
                    file.unlink()
        for name in sorted(new, key=lambda name: name == "config.json"):
            os.replace(fresh / name, out / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _is_model_weight(name: str) -> bool:
    return bool(re.fullmatch(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name))


def write_weights(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """model.safetensors, or shards of 5 GB with their index."""
    # A part of a larger tensor is copied: the file would get the whole.
    own = {
        name: tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
        for name, tensor in tensors.items()
    }
    save_torch_state_dict(own, directory, max_shard_size="5GB", metadata={"format": "pt"})


def write_tensors(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """One file of tensors, a pickle or safetensors by its suffix; appears complete or not at all."""
    # Without clone a view would be written with all it is a view of.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing_file(file) as partial:
        if Path(file).suffix == ".safetensors":
            save_file(plain, partial, metadata={"format": "pt"})
        else:
            torch.save(plain, partial)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write the tokenizer's files, and beside them the `tokenizer.model` it came from where there is one:
    original LLaVA on transformers 4 reads nothing else."""
    tokenizer.save_pretrained(directory)
    source = Path(tokenizer.name_or_path) / "tokenizer.model"
    if source.is_file() and source.resolve().parent != Path(directory).resolve():
        shutil.copyfile(source, Path(directory) / "tokenizer.model")


def config_for_disk(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's config as config.json, readable by transformers 5 and by 4.31, which LLaVA was written for.

    Old versions know `torch_dtype` and `rope_theta`, today's write `dtype` and `rope_parameters`: both are
    given. All fields of LLaMA and LLaVA are there, the reducer first of all; of the many that any model of
    transformers has, those that say something.
    """
    usual = PreTrainedConfig().to_dict()
    content = {
        name: value
        for name, value in config.to_dict().items()
        if name not in usual or value != usual[name] or name == "transformers_version"
    }
    if (dtype := content.get("dtype")) is not None:
        content["torch_dtype"] = dtype
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    return content


def save_full(model, tokenizer, out: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """A whole model: config.json, generation_config.json, safetensors shards and the tokenizer.

    The tower's weights are saved if the model has them, as LLaVA's training does. They are read back only if
    the config says `unfreeze_mm_vision_tower`.

    Args:
        model: a LLaVA, or a language model without vision.
        tokenizer: its tokenizer, or None.
        out: the directory.
        state_dict: the model's weights where they had to be gathered (ZeRO-3), named as in
            `model.state_dict()`.
    """
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach() for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    with replacing(out) as directory:
        write_weights(tensors, directory)
        model.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)
        config = config_for_disk(model.config)
        write_json(directory / "config.json", {**config, "architectures": [type(model).__name__]})


def save_projector(model, out: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """What adapter tuning leaves: config.json and mm_projector.bin (`model.mm_projector.*`).

    With `mm_use_im_start_end` the input embeddings are trained too, and are in the file.
    """
    state = model.state_dict() if state_dict is None else state_dict
    wanted = ("mm_projector.", "embed_tokens.") if model.config.mm_use_im_start_end else ("mm_projector.",)
    tensors = {
        new: tensor
        for name, tensor in state.items()
        if (new := canonical_name(name)) is not None and any(part in new for part in wanted)
    }
    with replacing(out) as directory:
        write_tensors(tensors, directory / PROJECTOR_FILES[1])
        write_json(directory / "config.json", config_for_disk(model.config))


def save_lora(
    model,
    out: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    non_lora_state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """What LoRA training leaves: the adapter as PEFT writes it, non_lora_trainables.bin, config.json.

    Args:
        model: the PeftModel around a LLaVA.
        state_dict: LoRA weights where they had to be gathered, named as in `model.state_dict()`.
        non_lora_state_dict: the other weights that were trained, named likewise
            (`base_model.model.model.mm_projector.*`). Default: the projector.
    """
    if non_lora_state_dict is None:
        non_lora_state_dict = {n: p for n, p in model.named_parameters() if "mm_projector." in n}
    with replacing(out) as directory:
        # False: trained embeddings are in non_lora_trainables.bin; "auto" would ask the Hub about the base.
        model.save_pretrained(
            directory,
            state_dict=None if state_dict is None else dict(state_dict),
            save_embedding_layers=False,
        )
        write_tensors(non_lora_state_dict, directory / EXTRA_FILES[1])
        write_json(directory / "config.json", config_for_disk(model.get_base_model().config))
