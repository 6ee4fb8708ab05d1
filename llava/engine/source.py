"""Which engine the flags of a command ask for, and how a checkpoint becomes one."""

from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any

from llava.conversation import default_conv_mode
from llava.engine.endpoint import EndpointEngine
from llava.engine.local import LocalEngine, check_template
from llava.errors import UserError
from llava.mm_utils import get_model_name_from_path


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and how to load it: arguments of `load_pretrained_model`, and the prompt template."""

    path: str
    base: str | None = None
    conv_mode: str | None = None  # None: the one the model was trained with
    reducer: str | None = None
    vision_tower: str | None = None
    anyres: str | None = None
    dtype: str | None = None
    attention: str | None = None
    device: str = "cuda"
    load_8bit: bool = False
    load_4bit: bool = False

    @classmethod
    def of(cls, args: Namespace) -> "ModelSource":
        """What the flags of a command say: --model-path, --model-base, and those named as the fields here."""
        given = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
        return cls(args.model_path, args.model_base, **given)

    @property
    def name(self) -> str:
        return get_model_name_from_path(self.path)

    def load(self, **options: Any) -> LocalEngine:
        """`options`: keywords of `LocalEngine`.

        Raises:
            UserError: no such template, a model without vision, and what `load_pretrained_model` raises.
        """
        from llava.model.builder import load_pretrained_model

        if self.conv_mode is not None:  # before the weights are read
            check_template(self.conv_mode)
        tokenizer, model, image_processor, _ = load_pretrained_model(
            self.path,
            self.base,
            self.name,
            load_8bit=self.load_8bit,
            load_4bit=self.load_4bit,
            device=self.device,
            reducer=self.reducer,
            vision_tower=self.vision_tower,
            anyres=self.anyres,
            dtype=self.dtype,
            attn_implementation=self.attention,
        )
        if image_processor is None:
            raise UserError(f"{self.path} is a language model without vision; a LLaVA checkpoint is needed.")
        conv_mode = self.conv_mode or default_conv_mode(self.name, tokenizer)
        return LocalEngine(model, tokenizer, image_processor, conv_mode, **options)


LOCAL_FLAGS: dict[str, Any] = {
    **{one.name: one.default for one in fields(ModelSource) if one.name not in ("path", "base", "reducer")},
    **{"model_base": None, "num_beams": 1, "batch_tokens": None, "decode_workers": None, "workers": None},
}
ENDPOINT_FLAGS: dict[str, Any] = {"model": None, "concurrency": 32}
"""Flags of commands that take either engine, and their defaults: how a model is loaded and run here; what to
ask a server for."""


def source_of(args: Namespace) -> ModelSource | EndpointEngine:
    """What the flags of a command say: the server of --endpoint, else the checkpoint of --model-path.

    Raises:
        UserError: flags of both together; what EndpointEngine raises.
    """
    wrong = LOCAL_FLAGS if args.endpoint else ENDPOINT_FLAGS
    given = [name for name, default in wrong.items() if getattr(args, name, default) != default]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(
            f"--endpoint and {flags}: the model of a server was loaded when that was started."
            if args.endpoint
            else f"{flags} without --endpoint URL, which names the server to ask."
        )
    if not args.endpoint:
        return ModelSource.of(args)
    return EndpointEngine(args.endpoint, args.model, concurrency=getattr(args, "concurrency", 32))
