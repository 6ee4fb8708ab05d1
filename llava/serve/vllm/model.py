"""The model in vLLM's engine: visual tokens -> projector -> a language model of vLLM's own."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoints import EMBEDDINGS, PROJECTOR, TOWER, canonical_name
from llava.model.projector import build_projector
from llava.serve.vllm.config import text_architecture
from llava.serve.vllm.processing import LlavaDummyInputs, LlavaProcessingInfo, LlavaProcessor


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputs
)
class LlavaForVisualTokens(nn.Module, SupportsMultiModal, SupportsPP):
    """LLaVA behind its reducer, on whatever language model the checkpoint has."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return DEFAULT_IMAGE_TOKEN

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        with self._mark_tower_model(vllm_config, "image"):
            self.mm_projector = build_projector(
                config.mm_projector_type, config.mm_hidden_size, config.hidden_size
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[text_architecture(config)],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        visual_tokens: Sequence[Tensor] | Tensor | None = None,
        image_embeds: Sequence[Tensor] | Tensor | None = None,
    ) -> Sequence[Tensor]:
        """One [K, hidden] block per picture, from blocks before the projector [K, C] or after it."""
        if image_embeds is not None:
            return list(image_embeds)
        return self.mm_projector(torch.cat(list(visual_tokens))).split(list(map(len, visual_tokens)))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Hidden states [tokens, hidden]; the inherited `embed_input_ids` has put the pictures in."""
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:  # one rank of tensor parallelism has them
            logits[..., self.config.image_token_id] = -torch.inf  # a row of the vocabulary for our use only
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._renamed(weights))

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Weights of any format under this model's names, embeddings with a row for each id.

        New rows, `<image>`'s among them, are the mean of the others, as our loader makes them; rows beyond
        the vocabulary are those that llava-hf adds.
        """
        rows = self.config.vocab_size
        for written, tensor in weights:
            name = canonical_name(written)
            if name is None or name.startswith((TOWER, "model.image_newline")):
                continue  # the front end's
            if name in EMBEDDINGS:
                tensor = tensor[:rows]
                if missing := rows - len(tensor):
                    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
                    tensor = torch.cat([tensor, mean.expand(missing, -1)])
            if name.startswith(PROJECTOR):
                yield name.removeprefix("model."), tensor
            else:
                yield f"language_model.{name}", tensor
