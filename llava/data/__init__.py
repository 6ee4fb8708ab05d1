"""Conversations and pictures as training batches."""

from llava.data.text import encode_conversation

__all__ = ["encode_conversation"]
