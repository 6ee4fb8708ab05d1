"""An answer piece by piece, while `generate` makes it."""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):
    """The answer as it grows, without special tokens, blanks around it and the template's stop string.

    Attributes:
        text: in the end, the answer. The pieces handed to `emit` make it up, unless the model's bytes are not
            UTF-8: then they differ in what stands for those.
        first: `time.perf_counter()` when the first new token was there.
    """

    def __init__(self, tokenizer: Any, stop: str | None, emit: Callable[[str], None]):
        self.tokenizer, self.stop, self.emit = tokenizer, stop or "", emit
        self.text, self.first = "", 0.0
        self._ids: list[int] = []
        self._emitted = 0  # characters
        self._prompt_is_next = True  # generate puts that out too

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        if not self._ids:
            self.first = time.perf_counter()
        self._ids += value.flatten().tolist()
        # Half a character, and what may turn out to be the beginning of the stop string, wait.
        text = self._decoded().rstrip("\ufffd")
        lengths = range(min(len(text), len(self.stop)), 0, -1)
        begun = next((n for n in lengths if text.endswith(self.stop[:n])), 0)
        self._emit_up_to(text[: len(text) - begun].rstrip())

    def end(self) -> None:
        self.text = self._decoded().removesuffix(self.stop).rstrip()
        self._emit_up_to(self.text)

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True).strip()

    def _emit_up_to(self, text: str) -> None:
        if piece := text[self._emitted :]:
            self._emitted = len(text)
            self.emit(piece)
