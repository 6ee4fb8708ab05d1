"""Tokenizers exactly as the released weights saw them: transformers 4's, on transformers 5.

Two kinds exist. A sentencepiece BPE (LLaMA, Vicuna, Mistral) is loaded as `LlamaTokenizer` by name, whatever
config.json says: the automatic choice takes `model_type: llava` for another model and silently loses the
space in front of a text. transformers 5 also differs from the sentencepiece tokenizer of 4 in three things:
a text that begins with a space, `legacy` mode after special tokens, and runs of spaces (it ranks merges by
id, where scores may put those of spaces last). `_as_sentencepiece` mends all three. Anything else (GPT-2,
ChatML and later kinds) is what its tokenizer.json says.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.errors import UserError, first_line
from llava.model.checkpoints.inspect import read_json
from llava.model.checkpoints.locate import resolve_directory

_SPACE = "▁"  # how sentencepiece writes a space (U+2581)
_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_*")


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory (or hub name).

    `legacy` is what the checkpoint's tokenizer_config.json says, else what its tokenizer.json was built with,
    else True (transformers 4's default). `padding_side` is "right" unless given. A tokenizer without a pad
    token pads with its unk token (else with eos), as LLaVA trains; `pad_token="[PAD]"` adds one of its own.
    Other keywords go to transformers' `from_pretrained`.

    Raises UserError where there are no tokenizer files or they cannot be read.
    """
    directory = resolve_directory(path, only=_FILES)
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise UserError(
            f"{path} has no tokenizer (neither tokenizer.model nor tokenizer.json); LoRA and projector "
            "checkpoints use their base model's: give it with --model-base."
        )
    config = _read_json(directory / "tokenizer_config.json")
    kwargs = {"padding_side": "right", **kwargs}
    if _is_sentencepiece(directory, config):
        legacy = kwargs.pop("legacy", None)
        if legacy is None:
            legacy = _legacy(directory, config)
        if not (directory / "tokenizer.json").is_file():
            # transformers 4 puts a BOS where no file says anything; a tokenizer.json says it itself.
            kwargs = {"add_bos_token": config.get("add_bos_token", True), **kwargs}
        with _reading(directory):
            tokenizer = LlamaTokenizer.from_pretrained(directory, legacy=legacy, **kwargs)
        _as_sentencepiece(tokenizer, legacy, directory / "tokenizer.model")
    else:
        with _reading(directory):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_language_model_tokenizer(path: str | Path, rows: int, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A llava-hf directory's tokenizer up to its language model's own `rows` tokens.

    `<image>` and `<pad>` follow these, and LLaVA has no embeddings for them: padding is `load_tokenizer`'s.
    Keywords as there.
    """
    whole = load_tokenizer(path, **kwargs)
    backend = json.loads(whole.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < rows]
    kept = {index: token for index, token in whole.added_tokens_decoder.items() if index < rows}
    own = {
        "pad_token": whole.unk_token or whole.eos_token,
        "image_token": None,
        "extra_special_tokens": {},
        "added_tokens_decoder": kept,
        "tokenizer_object": Tokenizer.from_str(json.dumps(backend)),
    }
    return load_tokenizer(path, **{**own, **kwargs})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """The libraries' reading of tokenizer files, and no code of ours: a damaged file raises anything."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the tokenizer in {path} cannot be read ({first_line(error)}); copy its files again."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _is_sentencepiece(directory: Path, config: dict[str, Any]) -> bool:
    """By content: a sentencepiece file, or a tokenizer.json with its BPE (byte fallback, "▁" for spaces). The
    class name alone does not tell: byte-level tokenizers have been published under LLaMA's."""
    if not (directory / "tokenizer.json").is_file():
        return True
    if not config.get("tokenizer_class", "LlamaTokenizer").startswith("LlamaTokenizer"):
        return False
    model = _read_json(directory / "tokenizer.json").get("model", {})
    return model.get("type") == "BPE" and model.get("byte_fallback", False)


def _legacy(directory: Path, config: dict[str, Any]) -> bool:
    if config.get("legacy") is not None:
        return config["legacy"]
    saved = _read_json(directory / "tokenizer.json")
    if not saved:
        return True
    # Legacy tokenizers prepend a space to every segment, the others to the first one.
    text = json.dumps([saved.get("normalizer"), saved.get("pre_tokenizer")])
    return '"Prepend"' in text or '"always"' in text


def _as_sentencepiece(tokenizer: LlamaTokenizer, legacy: bool, model_file: Path) -> None:
    """Set the backend so that it merges by the model's scores, where its file is there (what we saved has the
    right merges), and puts sentencepiece's dummy space in front, also where one stands already.

    `legacy`: in front of every segment between special tokens; decoding drops up to two leading spaces.
    Otherwise: in front of the text, unless it begins with a special token. Two Metaspaces do it: the first
    prepends a blank where the text begins with none, which after the normalizer is always; the second turns
    that blank into "▁".
    """
    backend = tokenizer.backend_tokenizer
    if model_file.is_file():
        vocabulary, merges = _by_score(model_file)
        backend.model = models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True)
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=2, right=0),
            ]
        )
    else:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
            ]
        )
    tokenizer.init_kwargs["legacy"] = legacy  # save_pretrained writes init_kwargs, and forgets this one


def _by_score(model_file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a sentencepiece BPE: every way to make a piece out of two, best score first.

    Runs of spaces may share one score; sentencepiece then takes the leftmost pair, so that a run grows from
    its left end: the longer left half goes first.
    """
    with _reading(model_file):
        pieces = SentencePieceProcessor(model_file=str(model_file))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    ranked = [
        (-pieces.get_score(i), -cut, piece[:cut], piece[cut:])
        for piece, i in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return vocabulary, [(left, right) for *_, left, right in sorted(ranked)]
