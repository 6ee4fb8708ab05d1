"""From pictures to visual tokens in vLLM's front end: tower and reducer run here, so that the count of tokens
of each picture is known before its prompt is scheduled. The engine gets [K, C] tokens instead of pixels."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BatchFeature, PreTrainedConfig
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)

from llava import hardware
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import UserError
from llava.mm_utils import process_images, read_pinpoints, tile_side
from llava.model.checkpoints import PROJECTOR, inspect_checkpoint, read_model_weights, resolve_directory
from llava.model.encoders import ENCODERS
from llava.model.load import tower_of
from llava.model.question import QuestionReader
from llava.reducers import build_reducer

TOKENS, EMBEDS = "visual_tokens", "image_embeds"
"""The two forms in which a picture reaches the engine: before the projector [K, C], after it [K, hidden]."""


class Encoder:
    """The part of a checkpoint in front of the language model: tower, reducer, projector.

    It is our own model class with no decoder layers, so every check and every rule is the one of
    `load_pretrained_model`.
    """

    def __init__(self, path: str | Path, config: PreTrainedConfig, dtype: torch.dtype, tokenizer: Any):
        info = inspect_checkpoint(path)
        weights = read_model_weights(info)  # mapped, not read: only what is used below is
        config = copy.deepcopy(config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 0, 1, None
        plan = hardware.plan(dtype=dtype)
        self.model = AutoModelForCausalLM.from_config(config)
        self.model.load_state_dict(
            {n: t for n, t in weights.tensors.items() if n.startswith((PROJECTOR, "model.image_newline"))},
            strict=False,  # the language model's are the engine's
        )
        self.model.to(device=plan.device, dtype=dtype)
        self.model.set_vision_tower(tower_of(info, config, weights, device=plan.device, dtype=dtype))
        # For reducers that look up the question's words: of the table only the rows they ask for are read.
        table = nn.Embedding.from_pretrained(weights.tensors["model.embed_tokens.weight"])
        self.model.set_input_embeddings(table)
        self.read_question = QuestionReader(self.model, tokenizer)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], spec: str, question: str) -> dict[str, list[Tensor]]:
        """One [K, C] block of visual tokens per picture, or, where pictures have tiles (LLaVA-1.6), one
        [K, hidden] block of embeddings.

        Raises:
            UserError: a reducer that cannot work with this tower.
        """
        model, config = self.model, self.model.config
        reducer = model.make_reducer(spec, allow_files=True)
        text = self.read_question(question, reducer)
        how = [reducer], [{name: tensor.to(model.device, model.dtype) for name, tensor in text.items()}]
        processor = model.get_vision_tower().image_processor
        pixels = [process_images([image], processor, config)[0] for image in images]
        if config.image_aspect_ratio == "anyres":
            # Tiles may share a budget, and rows end in an embedding (image_newline).
            both = zip(pixels, images, strict=True)
            return {EMBEDS: [model.embed_images([p], [i.size], *how)[0] for p, i in both]}
        return {TOKENS: [model.encode_images(block[None], *how)[0] for block in pixels]}


class LlavaProcessingInfo(BaseProcessingInfo):
    """What vLLM asks before it has seen a picture."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.max_tokens}

    @cached_property
    def max_tokens(self) -> int:
        """The most tokens a picture can have; from JSON files, because the engine process loads no tower.

        A view of N patches gives N + 1 tokens at most (CLS, or the one PruMerge appends); one whose tiles are
        joined gets image_newline at the end of each row.
        """
        config = self.get_hf_config()
        path = resolve_directory(config.mm_vision_tower, beside=Path(self.model_id))
        vision = AutoConfig.from_pretrained(path, local_files_only=True)
        vision = getattr(vision, "vision_config", vision)
        processor = ENCODERS[vision.model_type].processor_class.from_pretrained(path, local_files_only=True)
        side = tile_side(processor)
        rows = side // vision.patch_size
        views = 1
        if config.image_aspect_ratio == "anyres":
            points = read_pinpoints(config.image_grid_pinpoints)
            views += max((width // side) * (height // side) for width, height in points)
        return views * (rows * rows + rows)

    def asked(self, kwargs: Mapping[str, object]) -> dict[str, str]:
        """What decides over a picture's tokens: the canonical `spec` of the reducer that a request asks for
        (its own, else the server's, else the checkpoint's), the `question` or "" where that does not read it.

        Raises:
            ValueError: no such reducer or option, no question where one is read, other keywords.
        """
        merged: dict[str, Any] = self.ctx.get_merged_mm_kwargs(kwargs)
        spec = merged.pop("reducer", self.get_hf_config().mm_token_reducer)
        question = merged.pop("question", "")
        if merged:
            unknown = ", ".join(sorted(merged))
            raise ValueError(f"mm_processor_kwargs takes `reducer` and `question`, not {unknown}")
        reducer = build_reducer(spec, allow_files="reducer" not in kwargs)
        if not reducer.reads_question:
            return {"spec": reducer.spec, "question": ""}
        if not question or not isinstance(question, str):
            raise ValueError(
                f"reducer {spec!r} reads the question: put it into mm_processor_kwargs as `question`"
            )
        return {"spec": reducer.spec, "question": question}


class LlavaDummyInputs(BaseDummyInputsBuilder[LlavaProcessingInfo]):
    """What vLLM measures its memory with at start-up: embeddings, so that no tower has to run."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return DEFAULT_IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> dict[str, Any]:
        width = self.info.get_hf_config().hidden_size
        return {"image": [torch.zeros(self.info.max_tokens, width)] * mm_counts.get("image", 0)}


class LlavaProcessor(BaseMultiModalProcessor[LlavaProcessingInfo]):
    """Pictures to visual tokens, and as many `<image>` ids in the prompt as there are tokens.

    Whatever a request can get wrong is found here: an exception in the engine would end it for everybody,
    a ValueError here is an answer of status 400.
    """

    @cached_property
    def encoder(self) -> Encoder:
        """Loaded at the first picture: only one of vLLM's processes ever sees one."""
        config = self.info.ctx.model_config
        return Encoder(config.model, config.hf_config, config.dtype, self.info.get_tokenizer())

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        # What vLLM's caches know a picture by: differently written specs share an entry, different reducers
        # never do, whoever named them, nor do questions where the reducer reads them.
        asked = self.info.asked(inputs.hf_processor_mm_kwargs)
        return super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs=asked))

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        try:
            blocks = self.encoder(hf_data["images"], **self.info.asked(hf_kwargs))
        except UserError as error:
            raise ValueError(str(error)) from error
        return BatchFeature({name: [block.cpu() for block in found] for name, found in blocks.items()})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("image") for name in (TOKENS, EMBEDS)}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image = self.info.get_tokenizer().image_token_id

        def placeholders(index: int) -> list[int]:
            (block,) = out_mm_kwargs["image"][index].get_data().values()
            return [image] * len(block)

        return [PromptReplacement("image", target=[image], replacement=placeholders)]
