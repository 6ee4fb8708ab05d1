"""The config and the tokenizer of a checkpoint as vLLM gets them, both from what lies in the directory."""

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoints import inspect_checkpoint, llava_config_dict
from llava.model.load import build_config, tokenizer_of
from llava.serve.vllm import ARCHITECTURE, NAME


def load_config(path: str | Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerFast]:
    """Config and tokenizer of a whole checkpoint, `<image>` added to the tokenizer as a special token.

    The vocabulary has a row for every token, `<image>` too: no id that a request can hold lies outside the
    embedding table, where looking one up would end the engine.
    """
    info = inspect_checkpoint(path)
    config = build_config(llava_config_dict(info), info)
    tokenizer = tokenizer_of(info, config)
    tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
    config.image_token_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.architectures = [ARCHITECTURE]
    return config, tokenizer


def text_architecture(config: PreTrainedConfig) -> str:
    """What vLLM calls the language model: the class of the transformers config that ours extends."""
    base = next(one for one in type(config).__mro__ if one.__module__.startswith("transformers.models."))
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.model_type]


@register_config_parser(NAME)
class LlavaConfigParser(ConfigParserBase):
    """`--config-format llava`: needed because transformers takes `model_type: llava` for its own class."""

    def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
        config, _ = load_config(model)
        return config.to_dict(), config


class UseOurTokenizer(VerifyAndUpdateConfig):
    """Selects our tokenizer for our architecture, so that no flag has to."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        model_config.tokenizer_mode = NAME
