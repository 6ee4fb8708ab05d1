"""The language models LLaVA can be built on, one file each.

A file names a config class, a body and a causal model (the mixins of `llava.model.llava_arch` before
transformers' own classes) and registers the last; an import line here makes it known. Loading, training,
conversion and benchmarks follow from the table `LANGUAGE_MODELS`.
"""

from llava.model.language_model import llava_llama, llava_mistral, llava_qwen, llava_qwen3
from llava.model.llava_arch import LANGUAGE_MODELS, language_model_of

__all__ = [
    "LANGUAGE_MODELS",
    "language_model_of",
    "llava_llama",
    "llava_mistral",
    "llava_qwen",
    "llava_qwen3",
]
