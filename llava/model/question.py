"""What reducers read of the question (VisionFeatures' `text_tokens` and `text_embeds`), from its words."""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.reducers import Reducer

FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""How LLaVA asks for short answers; they say nothing about the picture."""

FUNCTION_WORDS = (
    "a about after all also am an and any are as at be been before being both but by can could did do "
    "does doing down during each either few for from further had has have having he her here hers him "
    "his how i if in into is it its itself just may me might more most my no nor not of off on once "
    "only or other our out over own same shall she should so some such than that the their them then "
    "there these they this those through to too under until up very was we were what when where which "
    "while who whom whose why will with would you your"
)


class QuestionReader:
    """Reads questions for a model's reducers.

    Args:
        model: a LLaVA model with its tower.
        tokenizer: the language model's.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self._clip_tokenizer: Any = None

    @torch.inference_mode()
    def __call__(self, question: str, reducer: Reducer) -> dict[str, Tensor]:
        """The fields that the reducer reads.

        Raises:
            UserError: it compares patches with text and the tower is no CLIP.
        """
        question = question.replace(DEFAULT_IMAGE_TOKEN, " ").strip()
        readers = {"text_tokens": self.text_tokens, "text_embeds": self.text_embeds}
        return {name: read(question) for name, read in readers.items() if name in reducer.reads}

    def text_tokens(self, question: str) -> Tensor:
        """[m, D] rows of the language model's embedding table: the question's content words, each tokenised
        by itself, without the request for a short answer. All words where none is a content word."""
        for sentence in FORMATS:
            question = question.replace(sentence, " ")
        words = re.findall(r"\w+", question)
        words = [word for word in words if word.lower() not in FUNCTION_WORDS.split()] or words
        ids = [one for word in words for one in self.tokenizer(word, add_special_tokens=False).input_ids]
        table = self.model.get_input_embeddings()
        return table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))

    def text_embeds(self, question: str) -> Tensor:
        """[M, e] CLIP's embeddings of the question, in pieces of what its text model reads at a time (77)."""
        tower = self.model.get_vision_tower()
        clip = tower.clip
        if self._clip_tokenizer is None:
            self._clip_tokenizer = AutoTokenizer.from_pretrained(tower.path, local_files_only=True)
        start, *ids, end = self._clip_tokenizer(question).input_ids
        size = clip.config.text_config.max_position_embeddings - 2  # as released, later pieces lack both ends
        pieces = [[start, *ids[at : at + size], end] for at in range(0, max(len(ids), 1), size)]
        embeds = [clip.get_text_features(torch.tensor([piece], device=clip.device)) for piece in pieces]
        return torch.cat([one.pooler_output for one in embeds])
