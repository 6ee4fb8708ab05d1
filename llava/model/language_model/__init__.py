"""The language models LLaVA can be built on, one file each, found by their place here.

A file names a config class, a body and a causal model (the mixins of `llava.model.llava_arch` before
transformers' own classes) and registers the last. Loading, training, conversion and benchmarks follow from
the table `LANGUAGE_MODELS`.
"""

import importlib
import pkgutil

from llava.model.llava_arch import LANGUAGE_MODELS, language_model_of

__all__ = ["LANGUAGE_MODELS", "language_model_of"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
