"""Everything LLaVA adds to a decoder language model: tower, reducer, projector, splice.

Three mixins, for a language model's config, body and causal model (whose way with pictures is told in
`llava.model.images`); `llava.model.language_model` has one file for each language model that combines them.
The result is a transformers model like any other (save_pretrained, from_pretrained, device_map,
quantization_config, Trainer). Two things differ from a text model:

- `input_ids` hold IMAGE_TOKEN_INDEX (-200) where an image goes; `images=` (pixels) or `visual_tokens=`
  (already reduced, before the projector) are consumed in the order of these placeholders over the batch.
- The vision tower is frozen and is stored in a directory of its own: from_pretrained leaves it out, even if
  the checkpoint has its keys, and `set_vision_tower(load_vision_tower(path))` puts it in.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.images import ImageMixin, Images
from llava.model.projector import build_projector
from llava.model.splice import Layout, gather, lay_out, split_padding
from llava.model.vision_tower import VisionTower
from llava.reducers import Reducer

logger = logging.get_logger(__name__)

_renamed = "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
CACHE_NAME = "cache" if _renamed else "past_key_values"
"""What the installed transformers calls the keys and values of earlier positions: 5.24 gave it a new name."""


@strict
class LlavaMetaConfig(PreTrainedConfig):
    """What LLaVA adds to a language model's config, types checked. Other fields are kept.

    Attributes:
        mm_token_reducer: spec of the token reducer, see `llava.reducers`; "none" keeps every token.
        mm_vision_tower: directory or hub name of the vision tower; None: a language model alone.
        mm_hidden_size: width of the tower's patches; None: no projector yet.
        mm_projector_type: see `llava.model.projector`.
        mm_vision_select_layer, mm_vision_select_feature: see `llava.model.vision_tower`.
        mm_patch_merge_type: how the tiles of an anyres image are joined: flat, spatial or spatial_unpad.
        mm_anyres_budget: how many tokens they keep: tile, shared or papers, see `llava.model.anyres`.
        image_aspect_ratio, image_grid_pinpoints: how pictures become pixels, see `llava.mm_utils`.
        mm_use_im_start_end, mm_use_im_patch_token: which tokens were added to the vocabulary. True is what
            LLaVA takes the latter for where a config does not say.
        tokenizer_padding_side: of batches that `forward` splices; `generate` always pads on the left.
        tokenizer_model_max_length: longer samples, and prompts, are cut to this many tokens.
        tune_mm_mlp_adapter, freeze_mm_mlp_adapter, mm_projector_lr: how the model was trained.
        unfreeze_mm_vision_tower: the checkpoint carries a tower of its own (LLaVA-1.6).
    """

    mm_token_reducer: str = "none"
    mm_vision_tower: str | None = None
    mm_hidden_size: int | None = None
    use_mm_proj: bool = True
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    mm_anyres_budget: Literal["tile", "shared", "papers"] = "tile"
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: list | str | None = None
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    tokenizer_padding_side: Literal["left", "right"] = "right"
    tokenizer_model_max_length: int | None = None
    tune_mm_mlp_adapter: bool = False
    freeze_mm_mlp_adapter: bool = False
    mm_projector_lr: float | int | None = None
    unfreeze_mm_vision_tower: bool = False


# Mixins: what they use of a language model comes from the class they are combined with.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class LlavaMetaModel(_Model):
    """A language model's body with the two modules whose weights LLaVA keeps beside it.

    Attributes:
        mm_projector: None until the tower's width is known (`config.mm_hidden_size`).
        vision_tower: None until `LlavaMetaForCausalLM.set_vision_tower`.
        image_newline: [hidden], ends each row of an anyres image; only with the merge type spatial_unpad.
    """

    def __init__(self, config: LlavaMetaConfig):
        super().__init__(config)
        self.vision_tower: VisionTower | None = None
        self.mm_projector: nn.Module | None = None
        if config.mm_hidden_size is not None:
            self.mm_projector = build_projector(
                config.mm_projector_type, config.mm_hidden_size, config.hidden_size
            )
        self.image_newline: nn.Parameter | None = None
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))
            self._is_hf_initialized = False  # the language model's __init__ believed itself complete
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.image_newline is not None:
            initialization.normal_(self.image_newline, std=self.config.hidden_size**-0.5)


class LlavaMetaForCausalLM(ImageMixin):
    """LLaVA on a language model. See the file's head for what it takes."""

    config_class: type[LlavaMetaConfig]
    body_class: ClassVar[type[LlavaMetaModel]]
    """The language model's body, with LlavaMetaModel."""
    text_class: ClassVar[type[PreTrainedModel]]
    text_config_class: ClassVar[type[PreTrainedConfig]]
    """The language model without LLaVA, and its config; `register` finds them."""

    # The tower comes from its own path.
    _keys_to_ignore_on_load_unexpected: Any = (r"(^|\.)vision_tower\.",)

    def __init__(self, config: LlavaMetaConfig):
        PreTrainedModel.__init__(self, config)  # the language model's own would build a second body
        self.model = self.body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.set_reducer(config.mm_token_reducer, allow_files=False)
        self.post_init()

    def get_model(self) -> LlavaMetaModel:
        return self.model

    def _prepare(
        self,
        input_ids: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None,
        labels: Tensor | Sequence[Tensor] | None,
        images: Images | None,
        image_sizes: Sequence[tuple[int, int]] | None,
        visual_tokens: Sequence[Tensor] | None,
        padding_side: str,
        visual_embeds: Sequence[Tensor] | None = None,
        reducers: Sequence[Reducer] | None = None,
    ) -> tuple[Tensor, Layout]:
        """The spliced batch: its embeddings [B, L, hidden] and its Layout."""
        if sum(given is not None for given in (images, visual_tokens, visual_embeds)) > 1:
            raise UserError("give images=, visual_tokens= or visual_embeds=, only one of them")
        if visual_embeds is not None:
            visual = list(visual_embeds)
        elif visual_tokens is not None:
            visual = self.project(visual_tokens)
        elif images is not None and len(images) > 0:
            visual = self.embed_images(images, image_sizes, reducers)
        else:
            visual = []

        layout = lay_out(
            split_padding(input_ids, attention_mask),
            [len(block) for block in visual],
            None if labels is None else split_padding(labels, attention_mask),
            padding_side=padding_side,
            max_length=self.config.tokenizer_model_max_length,
        )
        if not visual and self._must_touch_vision():
            visual = self._no_visual_tokens(encode=visual_tokens is None)
        text = self.model.embed_tokens(layout.text_ids.to(self.device))
        return gather(layout, text, [block.to(text) for block in visual]), layout

    def _must_touch_vision(self) -> bool:
        """Whether a batch without images still has to pass through the projector.

        In distributed training another rank may have images: DDP waits for a gradient of every trained
        parameter, ZeRO-3 for every rank to call every partitioned module.
        """
        return self.training and torch.is_grad_enabled() and self.model.mm_projector is not None

    def _no_visual_tokens(self, encode: bool) -> list[Tensor]:
        """A visual block of no tokens, connected to the projector, whose gradient becomes zero."""
        tower = self.model.vision_tower
        if encode and tower is not None and is_deepspeed_zero3_enabled():
            token = self.encode_images(torch.zeros(1, 3, tower.image_size, tower.image_size))[0][:1]
        else:
            token = torch.zeros(1, self.config.mm_hidden_size, device=self.device)
        return [self.project([token])[0][:0]]

    # What transformers calls

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        visual_tokens: Sequence[Tensor] | None = None,
        reducers: Sequence[Reducer] | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """The language model's forward over the spliced batch.

        With images the outputs are as long as the spliced batch, not as `input_ids`: samples are padded anew
        on `config.tokenizer_padding_side`, positions are counted from 0 per sample, and labels are moved
        along (visual tokens take no part in the loss). Other keywords (num_items_in_batch ...) are passed on.

        Args:
            input_ids: [B, L] ids with IMAGE_TOKEN_INDEX for each image.
            images: pixels of the images, in the order of the placeholders, see `Images`.
            image_sizes: (width, height) of each picture, for the spatial merge types.
            visual_tokens: instead of images, what `encode_images` returned for them.
            reducers: one a picture; None: the model's own.
            cache, past_key_values: keys and values of earlier positions, by its new and its old name.
            loss_only: compute the loss (same value) and no logits: the head runs on the positions that are
                scored, which for a small model with a large vocabulary saves a good part of a step.

        Raises:
            UserError: placeholders and images differ in number, and what `encode_images` raises.
        """
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None and self._has_vision(input_ids, cache, images, visual_tokens):
            inputs_embeds, layout = self._prepare(
                input_ids,
                attention_mask,
                labels,
                images,
                image_sizes,
                visual_tokens,
                self.config.tokenizer_padding_side,
                reducers=reducers,
            )
            device = inputs_embeds.device
            input_ids = None
            # Without padding no mask: the attention kernels are faster and positions are the default ones.
            attention_mask = layout.attention_mask.to(device) if layout.padded else None
            position_ids = layout.position_ids.to(device) if layout.padded else None
            labels = None if layout.labels is None else layout.labels.to(device)
        if loss_only and labels is not None:
            return self._loss(
                labels,
                kwargs.pop("num_items_in_batch", None),
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=False,
                **kwargs,
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _loss(
        self, labels: Tensor, num_items_in_batch: Tensor | int | None, **body
    ) -> CausalLMOutputWithPast:
        """The language model's loss, with logits only where the next label counts."""
        hidden = self.model(**body).last_hidden_state
        targets = labels[:, 1:]
        scored = targets != IGNORE_INDEX
        loss = self.loss_function(
            logits=self.lm_head(hidden[:, :-1][scored]),
            labels=None,
            vocab_size=self.config.vocab_size,
            shift_labels=targets[scored],
            num_items_in_batch=num_items_in_batch,
        )
        return CausalLMOutputWithPast(loss=loss)

    def _has_vision(self, input_ids, cache, images, visual_tokens) -> bool:
        """Whether this call needs splicing; later steps of a generation are plain text."""
        if images is not None or visual_tokens is not None or self._must_touch_vision():
            return True
        if cache is not None and cache.get_seq_length() > 0:
            return False
        return bool((input_ids == IMAGE_TOKEN_INDEX).any())

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | Sequence[Tensor] | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        visual_tokens: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        visual_embeds: Sequence[Tensor] | None = None,
        **kwargs,
    ):
        """transformers' generate over prompts with images; returns only the NEW ids, [B, <= max_new_tokens].

        Args:
            inputs: [B, L] ids with IMAGE_TOKEN_INDEX for each image, padded on any side if `attention_mask`
                says where; or a list of B 1-D tensors. `input_ids=` is the same argument.
            images, image_sizes, visual_tokens: as in `forward`.
            visual_embeds: instead of these, what `embed_images` returned for them.
            kwargs: everything else `GenerationMixin.generate` takes (streamer, num_beams, do_sample, ...).

        Raises:
            UserError: as `forward`.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise UserError("generate needs a prompt: input_ids, with -200 where an image goes")
        kwargs.pop("position_ids", None)  # counted anew: the visual tokens move every position
        inputs_embeds, layout = self._prepare(
            input_ids, attention_mask, None, images, image_sizes, visual_tokens, "left", visual_embeds
        )
        if layout.truncated:
            logger.warning_once(
                f"{layout.truncated} of {len(layout.lengths)} prompts were cut to "
                f"{self.config.tokenizer_model_max_length} tokens (tokenizer_model_max_length)"
            )
        mask = layout.attention_mask.to(inputs_embeds.device, torch.long)
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)


LANGUAGE_MODELS: dict[str, type[LlavaMetaForCausalLM]] = {}
"""By `model_type` of our config."""


def register(model_class: type[LlavaMetaForCausalLM]) -> type[LlavaMetaForCausalLM]:
    """Adds a class to the table, and to transformers' Auto classes; for use as a decorator."""
    model_class.text_class = model_class.__bases__[1]  # transformers' own, after the mixin
    model_class.text_config_class = model_class.text_class.config_class
    config_class = model_class.config_class
    LANGUAGE_MODELS[config_class.model_type] = model_class
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return model_class


def language_model_of(config: Mapping[str, Any], file: Path) -> type[LlavaMetaForCausalLM]:
    """The class for a config.json: of LLaVA's (any age), or of a language model without vision.

    `model_type` decides where it is one of ours or a language model's; released LLaVA-1.5 says "llava" there,
    and `architectures` decides.

    Args:
        file: where the config came from, for the error.

    Raises:
        UserError: a language model that is not in the table.
    """
    named = [config.get("model_type"), *(config.get("architectures") or [])]
    for name in named:
        for model_class in LANGUAGE_MODELS.values():
            types = model_class.config_class.model_type, model_class.text_config_class.model_type
            if name in (*types, model_class.__name__, model_class.text_class.__name__):
                return model_class
    known = ", ".join(model_class.text_config_class.model_type for model_class in LANGUAGE_MODELS.values())
    raise UserError(
        f"{file}: its language model ({', '.join(str(name) for name in named if name) or 'unnamed'}) is none "
        f"of those supported ({known})"
    )
