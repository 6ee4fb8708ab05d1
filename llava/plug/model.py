"""`reduce_tokens`: a model of transformers changes its class in place for one that shortens what it is given.

The new class is a subclass of the model's own, of the same name. Pixels and long prompts become a short batch
of embeddings (`families`, `shorten`), with which the class below is called. On the model lies one attribute,
`reducer`, and on its body one hook, which refuses pixels that would pass the reducer by.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from llava.model.vision_tower import ENCODERS
from llava.plug.families import FAMILIES, PIXELS, Llava, has_pixels
from llava.plug.shorten import Past, Short, positions_of, shorten
from llava.reducers import Reducer, build_reducer

LONG = {*PIXELS, "input_ids", "image_sizes", "image_sizes_videos", "batch_num_images", "mm_encoder_outputs"}
LONG |= {"vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy"}
LONG |= {"vision_aspect_ratio", "token_type_ids", "mm_token_type_ids", "position_ids"}
"""Keywords about the long prompt: the class below does not get them."""

CANNOT = "{} does not work with a reduced model: it goes by the positions of the unreduced prompt"


def reduce_tokens(model: PreTrainedModel, spec: str | Reducer | None = None) -> PreTrainedModel:
    """Makes the model reduce its visual tokens from now on, in place.

    Args:
        model: a LLaVA model of transformers (`FAMILIES` names the classes) or of a subclass.
        spec: the reducer, see `llava.reducers`; None: the one that the checkpoint's config records.

    Returns:
        The same model; `model.reducer` is the reducer.

    Raises:
        ValueError: another class, an unknown spec, a reducer that does not work with this model's tower. The
            model is left as it was.
    """
    untouched = type(model).untouched if isinstance(model, ReducedModel) else type(model)
    family = _family(untouched)
    if spec is None and (spec := getattr(model.config, "mm_token_reducer", None)) is None:
        raise ValueError(
            "this model's config records no reducer (mm_token_reducer): name one, for example "
            'reduce_tokens(model, "prumerge+(tokens=144)")'
        )
    reducer = build_reducer(spec)
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
    model.__class__ = _reduced_class(untouched)
    model.reducer = reducer
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `reduce_tokens`: the model is of its own class again. Returns the same model.

    Raises:
        ValueError: the model was not reduced.
    """
    if not isinstance(model, ReducedModel):
        raise ValueError(f"this {type(model).__name__} was not reduced: there is nothing to restore")
    _drop_hook(model)
    del model.reducer
    model.__class__ = type(model).untouched
    return model


class ReducedModel:
    """What stands before a class of transformers in the order of its methods; see `_reduced_class`."""

    untouched: type[PreTrainedModel]
    reducer: Reducer

    def reduced_forward(self, call: Callable, inputs: dict[str, Any]):
        """`call`, a forward, with few visual tokens: logits, loss and cache are those of the short batch."""
        short = self.shorten(inputs)
        if short is None:
            return call(**inputs)
        mask = short.after.mask
        output = call(
            **{key: value for key, value in inputs.items() if key not in LONG}
            | {
                "inputs_embeds": short.inputs_embeds,
                # Without padding no mask: the attention kernels are faster.
                "attention_mask": None if mask.all() else mask.long(),
                "position_ids": positions_of(mask)[:, -short.inputs_embeds.shape[1] :],
                "labels": short.labels,
            }
        )
        short.after.remember(_cache(inputs), output)
        return output

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As the class below, with few visual tokens: returns the prompt's ids as given, then the new ones."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        given = {**kwargs, "input_ids": input_ids}
        if given.get("attention_mask") is None and input_ids is not None:
            ends, pad = self.generation_config.eos_token_id, self.generation_config.pad_token_id
            is_told = pad is not None and pad != ends  # as transformers infers a mask
            given["attention_mask"] = input_ids != pad if is_told else torch.ones_like(input_ids)
        short = self.shorten(given, padding_side="left")
        if short is None:
            return super().generate(input_ids, *args, **kwargs)
        if kwargs.get("assistant_model") is not None:
            raise ValueError(CANNOT.format("assistant_model"))
        mask, new = short.after.mask, short.inputs_embeds.shape[1]
        result = super().generate(
            None,
            *args,
            **{key: value for key, value in kwargs.items() if key not in LONG}
            | {
                "input_ids": input_ids,  # what is generated is put behind these, and returned with them
                # As many as the cache has positions are cut off at the front, whatever they are.
                "inputs_embeds": F.pad(short.inputs_embeds, (0, 0, mask.shape[1] - new, 0)),
                "attention_mask": mask.long(),
            },
        )
        short.after.remember(_cache(kwargs), result)
        return result

    def shorten(self, inputs: Mapping[str, Any], padding_side: str | None = None) -> Short | None:
        """The short batch for the keywords of `forward` or `generate`; None where there is nothing to shorten.

        Raises:
            ValueError: images and prompts do not fit, or what would be wrong once positions have moved.
        """
        cache, input_ids, mask = _cache(inputs), inputs.get("input_ids"), inputs.get("attention_mask")
        if self.reducer.name == "none":
            return None
        if inputs.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs hold every visual token: give a reduced model pixel_values")
        if not has_pixels(inputs) and (getattr(cache, "reduced_past", None) is None or input_ids is None):
            return None
        if input_ids is None or inputs.get("inputs_embeds") is not None:
            raise ValueError("give a reduced model input_ids with its pixel_values, not inputs_embeds")

        past, length = Past.of(cache, mask, input_ids), input_ids.shape[1]
        if mask is None:
            mask = torch.ones(len(input_ids), past.long + length, device=input_ids.device)
        if not has_pixels(inputs) and (mask.ndim != 2 or mask.shape[1] == past.mask.shape[1] + length):
            return None  # a step of `generate`, where all is short
        # After a cache come the new ids alone, or (to `generate`) all once more; the mask counts all.
        new = mask.shape[1] - past.long
        if new != length and mask.shape[1] != length:
            raise ValueError(
                f"attention_mask counts {mask.shape[1]} positions, the prompt and its cache {past.long + length}"
            )
        if self.training and torch.is_grad_enabled() and inputs.get("labels") is None:
            raise ValueError(
                "a reduced model in training needs labels, which it shortens with the prompt: a loss computed "
                "outside (label_smoothing_factor, compute_loss_func) would set long labels against short logits"
            )
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            raise ValueError(CANNOT.format("logits_to_keep as a tensor"))
        if (given := inputs.get("position_ids")) is not None:
            usual = positions_of(mask)[:, -given.shape[-1] :]
            whole = torch.arange(mask.shape[1], device=mask.device)[-given.shape[-1] :].expand_as(usual)
            counts = mask[:, -given.shape[-1] :].bool()
            if not any(torch.equal(given.expand_as(usual)[counts], p[counts]) for p in (usual, whole)):
                raise ValueError(CANNOT.format("position_ids other than 0, 1, 2, ... (packed samples)"))
        return shorten(
            input_ids[:, -new:],
            mask[:, -new:].bool().to(input_ids.device),
            inputs.get("labels"),
            _family(self.untouched)(self, self.reducer).visuals(inputs),
            self.get_input_embeddings(),
            past,
            padding_side=padding_side,
        )

    def _prepare_generated_length(self, generation_config, model_input_name, input_ids_length, **kwargs):
        """Lengths are those of the ids, as in the class below, and not of the embeddings made of them."""
        if model_input_name == "inputs_embeds" and input_ids_length > 0:
            model_input_name = "input_ids"
            if generation_config.get_generation_mode() == GenerationMode.ASSISTED_GENERATION:
                raise ValueError(CANNOT.format("assisted decoding (prompt_lookup_num_tokens)"))
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(CANNOT.format("prefill_chunk_size"))
        return super()._prepare_generated_length(
            generation_config=generation_config,
            model_input_name=model_input_name,
            input_ids_length=input_ids_length,
            **kwargs,
        )

    def save_pretrained(self, *args, **kwargs):
        """As the class below; config.json records the reducer, which `reduce_tokens(model)` then obeys."""
        recorded = vars(self.config).get("mm_token_reducer")
        self.config.mm_token_reducer = self.reducer.spec
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            del self.config.mm_token_reducer
            if recorded is not None:
                self.config.mm_token_reducer = recorded

    def __reduce_ex__(self, protocol):
        """Pickles and copies by the class below, which can be imported."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_reduced, (self.untouched,), *state


class _Forward:
    """`forward` that shortens, then calls what lies below: what was set on the instance, else the class's own.

    accelerate's hooks and trl set `model.forward = ...`, which would hide a mere method: trl's SFTTrainer then
    calls the model's body by itself, and trains with every token. What lies below is looked up when `forward`
    is, so that those who wrap the forward that they find do not meet themselves.
    """

    def __get__(self, model: nn.Module | None, owner: type) -> Callable:
        own = owner.untouched.forward
        below = None if model is None else vars(model).get("forward")

        @functools.wraps(own)  # generate and Trainer read the signature
        def forward(self, *args, **kwargs):
            call = functools.partial(own, self) if below is None else below
            if not isinstance(self, ReducedModel):  # restored since
                return call(*args, **kwargs)
            if args:
                kwargs |= zip(list(inspect.signature(own).parameters)[1:], args, strict=False)
            return self.reduced_forward(call, kwargs)

        return forward if model is None else MethodType(forward, model)

    def __set__(self, model: nn.Module, value: Any) -> None:
        vars(model)["forward"] = value

    def __delete__(self, model: nn.Module) -> None:
        del vars(model)["forward"]


@functools.cache
def _reduced_class(untouched: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass that reduces, of the same name: save_pretrained writes it, Trainer reads it."""
    names = {name: getattr(untouched, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {"untouched": untouched, "forward": _Forward(), **names}
    return type(untouched.__name__, (ReducedModel, untouched), members)


def _new_reduced(untouched: type[PreTrainedModel]) -> PreTrainedModel:
    cls = _reduced_class(untouched)
    return cls.__new__(cls)


def _family(cls: type) -> type[Llava]:
    """How the class, or the class of transformers it is a subclass of, makes visual tokens."""
    for base in cls.__mro__:
        if base.__name__ in FAMILIES and base.__module__.startswith("transformers."):
            return FAMILIES[base.__name__]
    raise ValueError(f"a {cls.__name__} cannot be reduced: only {', '.join(FAMILIES)} of transformers")


def _cache(inputs: Mapping[str, Any]):
    """The cache of keys and values, by either name (5.24 renamed it)."""
    return inputs.get("past_key_values") if inputs.get("cache") is None else inputs["cache"]


def _refuse_pixels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """On the model's body: pixels that come here were not reduced."""
    if has_pixels(kwargs) or kwargs.get("mm_encoder_outputs") or (len(args) > 1 and args[1] is not None):
        raise ValueError(
            "pixels went to the body of a reduced model (model.model), past its forward, and would not be "
            "reduced: call the model itself, or restore(model) first"
        )


def _drop_hook(model: PreTrainedModel) -> None:
    hooks = model.model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse_pixels]:
        del hooks[key], model.model._forward_pre_hooks_with_kwargs[key]
