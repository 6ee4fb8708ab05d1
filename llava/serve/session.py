"""One conversation with one model about some pictures: what the terminal and the quickstart share.

The pictures are encoded once, when they come in; every turn reuses what the language model reads of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.image_processing_utils import BaseImageProcessor

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates
from llava.errors import UserError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        text: the answer, without special tokens.
        visual_tokens: tokens handed to the language model, one number per picture.
        vision_ms: pixels, tower, reducer and projector; 0 where an earlier turn has paid for them.
        prefill_ms: the language model up to the first new token.
        total_ms: vision_ms plus everything up to the last token.
        new_tokens: length of the answer, its end included.
    """

    text: str
    visual_tokens: tuple[int, ...]
    vision_ms: float
    prefill_ms: float
    total_ms: float
    new_tokens: int


@dataclass
class ChatSession:
    """A model with its tokenizer and processor, some pictures, and the conversation about them so far.

    A turn that fails leaves everything as it was before.

    Raises:
        UserError: no such template, or a model that cannot see.
    """

    model: LlavaLlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    conv_mode: str
    conversation: Conversation = field(init=False)
    images: tuple[Image.Image, ...] = field(init=False, default=())
    _embeds: list[Tensor] = field(init=False, default_factory=list)  # [K_i, hidden] per picture
    _vision_ms: float = field(init=False, default=0.0)  # not yet reported

    def __post_init__(self) -> None:
        if self.conv_mode not in conv_templates:
            known = ", ".join(sorted(conv_templates))
            raise UserError(
                f"there is no conversation template {self.conv_mode!r}; --conv-mode takes {known}."
            )
        if self.image_processor is None:
            raise UserError("this is a language model without vision; a chat needs a LLaVA checkpoint.")
        self.reset()

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Tokens of each picture."""
        return tuple(len(block) for block in self._embeds)

    def reset(self) -> None:
        """Forget the turns; keep the pictures."""
        self.conversation = conv_templates[self.conv_mode].copy()

    @torch.inference_mode()
    def look_at(self, images: list[Image.Image] | tuple[Image.Image, ...]) -> None:
        """Encode RGB pictures (or none) in place of those there were; a new conversation begins.

        Raises:
            UserError: pictures the model cannot take; those before stay.
        """
        start = time.perf_counter()
        embeds = []
        if images:
            pixels = process_images(images, self.image_processor, self.model.config)
            embeds = self.model.embed_images(pixels, [image.size for image in images])
            _wait_for(self.model.device)
        self.images, self._embeds = tuple(images), embeds
        self._vision_ms = 1000 * (time.perf_counter() - start)
        self.reset()

    def use_reducer(self, spec: str) -> None:
        """Reduce visual tokens as `spec` says, the present pictures' too; a new conversation begins.

        Raises:
            UserError: no such reducer, or one that cannot work with this tower; the one before stays.
        """
        before = self.model.reducer.spec
        self.model.set_reducer(spec)
        try:
            self.look_at(self.images)
        except UserError:
            self.model.set_reducer(before)
            raise

    def question(self, text: str) -> str:
        """The user's turn as the weights know it: in the first one, an <image> line for each picture in
        front, unless the text says itself where they go.

        Raises:
            UserError: the text has another number of <image> than there are pictures.
        """
        tag, count = DEFAULT_IMAGE_TOKEN, len(self.images)
        first = len(self.conversation.messages) == self.conversation.offset
        written = text.count(tag)
        if written and not first:
            raise UserError(f"{tag} goes into the first turn, where the pictures are: leave it out.")
        if written and written != count:
            there = "is 1 picture" if count == 1 else f"are {count or 'no'} pictures"
            raise UserError(
                f"the question has {written} {tag} but there {there}: write one for each, or leave it out."
            )
        if first and not written:
            text = f"{tag}\n" * count + text
        if self.model.config.mm_use_im_start_end:
            text = text.replace(tag, DEFAULT_IM_START_TOKEN + tag + DEFAULT_IM_END_TOKEN)
        return text

    @torch.inference_mode()
    def ask(
        self,
        text: str,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 512,
        emit: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer one turn and add both sides to the conversation.

        Args:
            text: what the user says.
            temperature, top_p: of sampling; temperature 0 answers greedily.
            max_new_tokens: bound of the answer; less where the model's context ends before.
            emit: called with each piece of the answer as it comes.

        Raises:
            UserError: see `question`, or no room is left in the model's context.
        """
        turn = self.conversation.copy()
        turn.append_message(turn.roles[0], self.question(text))
        turn.append_message(turn.roles[1], None)
        ids = tokenizer_image_token(turn.get_prompt(), self.tokenizer, return_tensors="pt")
        length = len(ids) - len(self._embeds) + sum(self.visual_tokens)
        stop = turn.stop_string if turn.stop_string != self.tokenizer.eos_token else None
        stream = _Stream(self.tokenizer, stop, emit or _ignore)
        start = time.perf_counter()
        new = self.model.generate(
            ids[None],
            visual_embeds=self._embeds,
            max_new_tokens=min(max_new_tokens, self._room(length)),
            streamer=stream,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"stop_strings": [stop], "tokenizer": self.tokenizer} if stop else {}),
            **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
            **({"top_p": top_p} if temperature and top_p is not None else {}),
        )
        end = time.perf_counter()
        turn.messages[-1][1] = stream.text
        self.conversation = turn
        vision_ms, self._vision_ms = self._vision_ms, 0.0
        return Reply(
            text=stream.text,
            visual_tokens=self.visual_tokens,
            vision_ms=vision_ms,
            prefill_ms=1000 * (stream.first - start),
            total_ms=vision_ms + 1000 * (end - start),
            new_tokens=new.shape[1],
        )

    def _room(self, length: int) -> int:
        """Tokens an answer may have after a prompt of `length`."""
        context = self.model.config.max_position_embeddings
        longest = min(context - 1, self.model.config.tokenizer_model_max_length or context)
        if length > longest:
            raise UserError(
                f"the conversation is {length} tokens long and the model reads at most {longest}: begin a "
                "new one (/reset), or keep fewer visual tokens (/reducer prumerge+)."
            )
        return context - length


class _Stream(BaseStreamer):
    """The answer as it grows, without special tokens, blanks around it and the template's stop string.

    Attributes:
        text: in the end, the answer. The pieces handed to `emit` make it up, unless the model's bytes are
            no UTF-8: then they differ in what stands for those.
        first: `time.perf_counter()` when the first new token was there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | None, emit: Callable[[str], None]):
        self.tokenizer, self.stop, self.emit = tokenizer, stop or "", emit
        self.text, self.first = "", 0.0
        self._said = 0  # characters
        self._ids: list[int] = []
        self._prompt_is_next = True  # generate hands that out too

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        if not self._ids:
            self.first = time.perf_counter()
        self._ids += value.flatten().tolist()
        # Half a character, and what may turn out to be the beginning of the stop string, wait.
        text = self._decoded().rstrip("\ufffd")
        self._hand_out(text[: len(text) - _overlap(text, self.stop)].rstrip())

    def end(self) -> None:
        self.text = self._decoded().removesuffix(self.stop).rstrip()
        self._hand_out(self.text)

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True).strip()

    def _hand_out(self, text: str) -> None:
        if piece := text[self._said :]:
            self._said = len(text)
            self.emit(piece)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def _ignore(piece: str) -> None:
    pass


def _wait_for(device: torch.device) -> None:
    """Kernels run on after their call returns; a clock must not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
