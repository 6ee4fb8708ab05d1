"""One conversation with one model about some pictures: what the terminal, the web page and the quickstart share.

The pictures are encoded once, when they come in; every turn reuses their visual tokens.
"""

import time
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import StoppingCriteria, TextStreamer

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates
from llava.errors import UserError
from llava.mm_utils import process_images, tokenizer_image_token


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        text: the answer, without special tokens.
        visual_tokens: tokens handed to the language model, one number per picture.
        vision_ms: tower and reducer, once per picture set (0 when they were encoded in an earlier turn).
        prefill_ms: projector and language model up to the first new token.
        total_ms: vision_ms plus everything up to the last token.
        new_tokens: length of the answer.
    """

    text: str
    visual_tokens: list[int]
    vision_ms: float
    prefill_ms: float
    total_ms: float
    new_tokens: int


class FirstTokenClock(StoppingCriteria):
    """Never stops anything; notes when the first new token was there."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class ChatSession:
    """A model, its tokenizer and processor, and the conversation so far.

    `images` may be set before the first turn only: LLaVA's conversations carry their pictures in front.
    """

    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    conv_mode: str
    conversation: Conversation = field(init=False)
    encoded: list[torch.Tensor] = field(init=False, default_factory=list)
    vision_ms: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.conv_mode not in conv_templates:
            raise UserError(f"there is no conversation template {self.conv_mode!r}; --conv-mode takes one of "
                            f"{', '.join(sorted(conv_templates))}.")
        self.reset()

    def reset(self) -> None:
        """Forget the turns; keep the pictures."""
        self.conversation = conv_templates[self.conv_mode].copy()

    def look_at(self, images: list[Image.Image]) -> None:
        """Encode RGB pictures; the next turn opens a new conversation about them."""
        self.reset()
        start = time.perf_counter()
        pixels = process_images(images, self.image_processor, self.model.config)
        tower = self.model.get_vision_tower()
        self.encoded = []
        for one in pixels:  # a tensor of pictures, or a list where tiling gave them different shapes
            crops = one if one.ndim == 4 else one[None]
            crops = crops.to(tower.device, tower.dtype)
            self.encoded.append(torch.cat(self.model.encode_images(crops)))
        self.vision_ms = 1000 * (time.perf_counter() - start)

    def question(self, text: str) -> str:
        """The user's turn as the weights know it: one <image> line per picture, in the first turn."""
        if not self.encoded or len(self.conversation.messages) > self.conversation.offset:
            return text
        if DEFAULT_IMAGE_TOKEN in text:
            if text.count(DEFAULT_IMAGE_TOKEN) != len(self.encoded):
                raise UserError(
                    f"the question names <image> {text.count(DEFAULT_IMAGE_TOKEN)} times but there are "
                    f"{len(self.encoded)} pictures; write it once per picture, or leave it out."
                )
            return text
        tag = DEFAULT_IMAGE_TOKEN
        if self.model.config.mm_use_im_start_end:
            tag = DEFAULT_IM_START_TOKEN + tag + DEFAULT_IM_END_TOKEN
        return f"{tag}\n" * len(self.encoded) + text

    @torch.inference_mode()
    def ask(
        self,
        text: str,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 512,
        stream: bool = False,
    ) -> Reply:
        """Answer one turn and add both sides to the conversation; `stream` prints words as they come."""
        user, assistant = self.conversation.roles
        self.conversation.append_message(user, self.question(text))
        self.conversation.append_message(assistant, None)
        prompt = self.conversation.get_prompt()
        ids = tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")[None]
        clock = FirstTokenClock()
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        stop = self.conversation.stop_string
        vision_ms, self.vision_ms = self.vision_ms, 0.0
        start = time.perf_counter()
        new = self.model.generate(
            ids.to(self.model.device),
            visual_tokens=self.encoded or None,
            attention_mask=torch.ones_like(ids).to(self.model.device),
            max_new_tokens=max_new_tokens,
            stopping_criteria=[clock],
            streamer=TextStreamer(self.tokenizer, skip_special_tokens=True) if stream else None,
            stop_strings=[stop] if stop else None,
            tokenizer=self.tokenizer if stop else None,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        end = time.perf_counter()
        answer = self.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        if stop:
            answer = answer.removesuffix(stop).strip()
        self.conversation.messages[-1][1] = answer
        return Reply(
            text=answer,
            visual_tokens=[len(tokens) for tokens in self.encoded],
            vision_ms=vision_ms,
            prefill_ms=1000 * ((clock.first or end) - start),
            total_ms=vision_ms + 1000 * (end - start),
            new_tokens=new.shape[1],
        )
