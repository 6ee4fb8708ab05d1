"""The subclass that a reduced model is of: shortens what it is given, and calls the class below with that.

Pixels and prompts with all their placeholders become a short batch of embeddings (`families`, `shorten`).
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from llava.plug.families import PIXELS, family_of, pixels_of
from llava.plug.shorten import Past, Short, positions_of, shorten
from llava.reducers import Reducer

LONG = {*PIXELS, "input_ids", "image_sizes", "image_sizes_videos", "batch_num_images", "mm_encoder_outputs"}
LONG |= {"vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy"}
LONG |= {"vision_aspect_ratio", "token_type_ids", "mm_token_type_ids", "position_ids"}
"""Keywords about the long prompt: the class below does not get them."""

CANNOT = "{} does not work with a reduced model: it goes by the positions of the unreduced prompt"


# A mixin: what it uses of a model comes from the class it stands before.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class ReducedModel(_Model):
    """What stands before a class of transformers in the order of its methods; see `reduced_class`."""

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
        """As the class below, with few visual tokens: returns the prompt's ids as given, then new ones."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        given = {**kwargs, "input_ids": input_ids}
        if given.get("attention_mask") is None and input_ids is not None:
            ends, pad = self.generation_config.eos_token_id, self.generation_config.pad_token_id
            is_told = pad is not None and pad not in (ends if isinstance(ends, list) else [ends])
            # As transformers infers a mask.
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
        """The short batch for the keywords of `forward` or `generate`; None: there is nothing to shorten.

        Raises:
            ValueError: images and prompts do not fit, or what would be wrong once positions have moved.
        """
        cache, input_ids, mask = _cache(inputs), inputs.get("input_ids"), inputs.get("attention_mask")
        has_pixels = bool(pixels_of(inputs))
        if self.reducer.name == "none":
            return None
        if inputs.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs hold every visual token: give a reduced model pixel_values")
        if not has_pixels and (getattr(cache, "reduced_past", None) is None or input_ids is None):
            return None
        if input_ids is None or inputs.get("inputs_embeds") is not None:
            raise ValueError("give a reduced model input_ids with its pixel_values, not inputs_embeds")

        past, length = Past.of(cache, mask, input_ids), input_ids.shape[1]
        if not has_pixels and padding_side is None:
            # A step of `generate` counts as the cache does; it has no mask where all positions count.
            if mask is None:
                is_short = past.mask.all()
            else:
                is_short = (
                    mask.ndim != 2 or mask.shape[1] == past.mask.shape[1] + length != past.long + length
                )
            if is_short:
                return None
        if mask is None:
            mask = torch.ones(len(input_ids), past.long + length, device=input_ids.device)
        # After a cache come the new ids alone, or (to `generate`) all once more; the mask counts all.
        new = mask.shape[1] - past.long
        if new != length and mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} positions, the prompt and its cache {past.long + length}"
            )
        if self.training and torch.is_grad_enabled() and inputs.get("labels") is None:
            raise ValueError(
                "a reduced model in training needs labels, which it shortens with the prompt: a loss that is "
                "computed outside (label_smoothing_factor, compute_loss_func) would set long labels against "
                "short logits"
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
            family_of(self.untouched)(self, self.reducer).visuals(inputs),
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
    """`forward` that shortens, then calls what lies below: what the instance was given, else the class's own.

    accelerate's hooks and trl set `model.forward = ...`, which would hide a mere method: trl's SFTTrainer
    then calls the model's body by itself, and trains with every token. What lies below is looked up when
    `forward` is, so that those who wrap the forward that they find do not meet themselves.
    """

    def __get__(self, model: nn.Module | None, owner: Any) -> Callable:
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
def reduced_class(untouched: Any) -> Any:
    """The subclass that reduces, of the same name: save_pretrained writes it, Trainer reads it."""
    names = {name: getattr(untouched, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {"untouched": untouched, "forward": _Forward(), **names}
    return type(untouched.__name__, (ReducedModel, untouched), members)


def _new_reduced(untouched: Any) -> PreTrainedModel:
    cls = reduced_class(untouched)
    return cls.__new__(cls)


def _cache(inputs: Mapping[str, Any]):
    """The cache of keys and values, by either name (5.24 renamed it)."""
    return inputs.get("past_key_values") if inputs.get("cache") is None else inputs["cache"]
