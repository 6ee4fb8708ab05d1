"""The way of the data: vision tower -> reducer -> projector -> splice -> language model, and its storage."""

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM"]
