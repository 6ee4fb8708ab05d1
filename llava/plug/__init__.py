"""Token reducers inside transformers' own LLaVA classes, in one line. docs/plug.md.

    reduce_tokens(model, "prumerge+(tokens=144)")

The model changes its class in place for a subclass of the same name (`model.py`). On it lies one attribute,
`reducer`, and on its body one hook, which refuses pixels that would pass the reducer by.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from llava.model.encoders import ENCODERS
from llava.plug.families import family_of, pixels_of
from llava.plug.model import ReducedModel, reduced_class
from llava.reducers import Reducer, build_reducer

__all__ = ["reduce_tokens", "restore"]


def reduce_tokens(model: PreTrainedModel, spec: str | Reducer | None = None) -> PreTrainedModel:
    """Makes the model reduce its visual tokens from now on, in place.

    Args:
        model: a LLaVA model of transformers (`FAMILIES` names the classes) or of a subclass.
        spec: the reducer, see `llava.reducers`; None: the one that the checkpoint's config records.

    Returns:
        The same model; `model.reducer` is the reducer.

    Raises:
        ValueError: another class, an unknown spec, a reducer that does not work with this model's tower, a
            model sharded by FSDP. The model is left as it was.
    """
    _require_unsharded(model)
    untouched: Any = type(model).untouched if isinstance(model, ReducedModel) else type(model)
    family = family_of(untouched)
    recorded = spec is None
    if recorded and (spec := getattr(model.config, "mm_token_reducer", None)) is None:
        raise ValueError(
            "this model's config records no reducer (mm_token_reducer): name one, for example "
            'reduce_tokens(model, "prumerge+(tokens=144)")'
        )
    reducer = build_reducer(spec, allow_files=not recorded)
    if reducer.name != "none":
        kind = model.config.vision_config.model_type
        if kind not in ENCODERS:
            raise ValueError(
                f"the tokens of a {kind!r} tower cannot be reduced: only of {', '.join(ENCODERS)}"
            )
        family(model, reducer).try_out()

    _drop_hook(model)
    if reducer.name != "none":
        model.model.register_forward_pre_hook(_refuse_pixels, with_kwargs=True)
    reduced: Any = model
    reduced.__class__, reduced.reducer = reduced_class(untouched), reducer
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `reduce_tokens`: the model is of its own class again. Returns the same model.

    Raises:
        ValueError: the model was not reduced, or FSDP has sharded it since.
    """
    _require_unsharded(model)
    if not isinstance(model, ReducedModel):
        raise ValueError(f"this {type(model).__name__} was not reduced: there is nothing to restore")
    _drop_hook(model)
    reduced: Any = model
    del reduced.reducer
    reduced.__class__ = type(model).untouched
    return model


def _require_unsharded(model: nn.Module) -> None:
    if isinstance(model, FSDPModule):  # which is a change of its class as well
        raise ValueError(
            "this model is sharded (FSDP): call reduce_tokens and restore before that, or save and load it"
        )


def _refuse_pixels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """On the model's body: pixels that come here were not reduced."""
    if pixels_of(kwargs) or kwargs.get("mm_encoder_outputs") or (len(args) > 1 and args[1] is not None):
        raise ValueError(
            "pixels went to the body of a reduced model (model.model), past its forward, and would not be "
            "reduced: call the model itself, or restore(model) first"
        )


def _drop_hook(model: PreTrainedModel) -> None:
    hooks = model.model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse_pixels]:
        del hooks[key], model.model._forward_pre_hooks_with_kwargs[key]
