"""The plug-in that lets vLLM serve LLaVA checkpoints whose count of visual tokens depends on the picture.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in each of its
processes. `--config-format llava` selects it; `llava serve` passes that and everything else that is needed.

    front end   media.py                bytes of a picture -> RGB
                template.py, text.py    messages -> prompt -> ids
                processing.py           RGB -> tower -> reducer -> [K, C] visual tokens, K `<image>` ids
    engine      model.py                visual tokens -> projector -> language model

Some of what is used here is internal to vLLM, so the version is pinned (VERSION) and tested by tests_vllm.
"""

VERSION = "0.32"
"""The release of vLLM that this plug-in is written for and tested with."""

NAME = "llava"
"""What vLLM's --config-format, tokenizer mode and media connector are called here."""

ARCHITECTURE = "LlavaForVisualTokens"
"""The one model class vLLM knows us by; the language model inside it follows from the config."""


def register() -> None:
    """Tells vLLM about config, tokenizer, media and model. May be called more than once in a process."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    from llava.serve.vllm import config, media  # noqa: F401  (each registers its class)

    ModelRegistry.register_model(ARCHITECTURE, "llava.serve.vllm.model:LlavaForVisualTokens")
    TokenizerRegistry.register(NAME, "llava.serve.vllm.text", "LlavaTokenizer")
    RENDERER_REGISTRY.register(NAME, "vllm.renderers.hf", "HfRenderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = config.UseOurTokenizer
