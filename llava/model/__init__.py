"""The way of the data: vision tower -> reducer -> projector -> splice -> LLaMA, and how it is stored."""

from llava.model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM"]
