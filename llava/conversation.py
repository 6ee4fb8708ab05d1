"""Prompt templates: how turns of a conversation become the one string a model was trained on.

The templates are data (`_TEMPLATES`); the five separator styles are the only code. The strings are part of
the released weights: a changed character changes answers.

    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message(conv.roles[0], "<image>\\nWhat is this?")
    conv.append_message(conv.roles[1], None)          # the turn the model is to fill
    prompt = conv.get_prompt()
"""

import base64
import dataclasses
import io
from enum import Enum, auto
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN


class SeparatorStyle(Enum):
    """How the turns of a template are joined; `Conversation.get_prompt` spells each out."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclasses.dataclass
class Conversation:
    """A template and the turns said so far.

    `messages` holds `[role, message]` lists. A message is a string, `None` for the turn the model is to fill
    (an empty string renders like `None`, as the released models expect), or a tuple
    `(text, PIL image, mode)` with mode one of Pad, Default, Crop, Resize: a web page's picture.
    `offset` is the number of example turns that belong to the template.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Any) -> None:
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """A conversation of its own: appending to it leaves this one alone."""
        return dataclasses.replace(self, messages=[list(turn) for turn in self.messages])

    @property
    def stop_string(self) -> str | None:
        """What ends an answer: the separator the model learned to write after its own turns.

        Generation stops there; where it is the tokenizer's end-of-sequence token it stops by itself.
        """
        two_ends = self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
        return self.sep2 if two_ends else self.sep

    def get_prompt(self) -> str:
        """The prompt of all turns so far.

        Raises TypeError for the PLAIN style with two filled turns (it has no second separator; training joins
        its two turns itself) and ValueError for LLAMA_2 when the first turn is empty or not the user's.
        """
        turns = [(role, _text(message)) for role, message in self._turns_with_image_first()]
        match self.sep_style:
            case SeparatorStyle.SINGLE:
                return self.system + self.sep + "".join(_named(role, text, self.sep) for role, text in turns)
            case SeparatorStyle.TWO:
                ends = (self.sep, self.sep2)
                return (
                    self.system
                    + self.sep
                    + "".join(_named(role, text, ends[i % 2]) for i, (role, text) in enumerate(turns))
                )
            case SeparatorStyle.MPT:
                return (
                    self.system
                    + self.sep
                    + "".join(role + text + self.sep if text else role for role, text in turns)
                )
            case SeparatorStyle.PLAIN:
                ends = (self.sep, self.sep2)
                return self.system + "".join(text + ends[i % 2] for i, (_, text) in enumerate(turns) if text)
            case SeparatorStyle.LLAMA_2:
                return self._llama_2_prompt(turns)

    def _llama_2_prompt(self, turns: list[tuple[str, str | None]]) -> str:
        if turns and (turns[0][0] != self.roles[0] or not turns[0][1]):
            raise ValueError(f"a LLAMA_2 prompt begins with a turn of {self.roles[0]} that is not empty")
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        prompt = ""
        for i, (_, text) in enumerate(turns):
            if not text:
                continue
            if i % 2 == 0:
                prompt += f"{self.sep}[INST] {system if i == 0 else ''}{text} [/INST]"
            else:
                prompt += f" {text} {self.sep2}"
        # The tokenizer puts `<s>` itself. lstrip takes a set of characters, here on purpose: it is what the
        # models were trained with.
        return prompt.lstrip(self.sep)

    def _turns_with_image_first(self) -> list[list[Any]]:
        """The turns, a picture in the first of them announced in front of its text."""
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return self.messages
        role, (text, *_) = self.messages[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            head = [
                [self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"],
                [self.roles[1], "Received."],
                [role, text],
            ]
        else:
            head = [[role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"]]
        return head + self.messages[1:]

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """The pictures of the user's turns, in order: PIL images, or base64 strings of PNG files."""
        images = [
            fit_for_web(message[1], message[2])
            for i, (_, message) in enumerate(self.messages[self.offset :])
            if i % 2 == 0 and isinstance(message, tuple)
        ]
        return images if return_pil else [_base64(image, "PNG") for image in images]

    def to_gradio_chatbot(self) -> list[dict[str, str]]:
        """The turns as a chat page takes them: `{"role": "user" | "assistant", "content": text}`.

        A picture becomes an HTML image in front of its text. An unfilled turn is left out.
        """
        rows = []
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            if message is None:
                continue
            content = message
            if isinstance(message, tuple):
                picture = fit_for_web(message[1], message[2], longest=800, shortest=400)
                source = f"data:image/jpeg;base64,{_base64(picture.convert('RGB'), 'JPEG')}"
                text = message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
                content = f'<img src="{source}" alt="user upload image" />{text}'
            rows.append({"role": "assistant" if i % 2 else "user", "content": content})
        return rows

    def dict(self) -> dict[str, Any]:
        """What a conversation log keeps: pictures are left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _text(message: Any) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def _named(role: str, text: str | None, end: str | None) -> str:
    return f"{role}: {text}{end}" if text else f"{role}:"


def fit_for_web(image: Any, mode: str, longest: int = 1344, shortest: int = 672) -> Any:
    """A PIL image as a web page sends it: squared by `mode` (Pad, Resize) or left (Default, Crop), then made
    smaller, aspect kept, when its longer side exceeds `longest` pixels."""
    if mode == "Pad":
        from llava.mm_utils import expand2square  # imports torch, which a prompt does not need

        image = expand2square(image, (122, 116, 104))
    elif mode == "Resize":
        image = image.resize((336, 336))
    elif mode not in ("Default", "Crop"):
        raise ValueError(f"image mode {mode!r} is none of Pad, Default, Crop, Resize")
    width, height = image.size
    if max(width, height) <= longest:
        return image
    aspect = max(width, height) / min(width, height)
    short = int(min(longest / aspect, shortest, min(width, height)))
    long = int(short * aspect)
    return image.resize((short, long) if height > width else (long, short))


def _base64(image: Any, file_format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return base64.b64encode(buffer.getvalue()).decode()


_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_HUMAN, _USER = _CURIOUS.format("human"), _CURIOUS.format("user")
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with "
    "a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_SMOLLM2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
_CHATML_DIRECT = "<|im_start|>system\nAnswer the questions."
_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")
# SmolLM2 has a newline after `<|im_end|>`. The role that follows carries it: an answer ends at the token.
_SMOLLM2_ROLES = ("\n<|im_start|>user\n", "\n<|im_start|>assistant\n")

# The one worked example the oldest template carries.
_EXAMPLE = (
    (
        "Human",
        "What are the key differences between renewable and non-renewable energy sources?",
    ),
    (
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short "
        "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
        "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, and "
        "natural gas. Here are some key differences between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
        "energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
        "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and "
        "other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
        "have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
        "locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different"
        " situations and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-"
        "renewable sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)

_H, _U, _NONE = ("Human", "Assistant"), ("USER", "ASSISTANT"), ("", "")
_S = SeparatorStyle
_TEMPLATES: tuple[tuple[str, str, tuple[str, str], SeparatorStyle, str, str | None, str], ...] = (
    # name, system, roles, style, sep, sep2, version
    ("default", _HUMAN, _H, _S.SINGLE, "###", None, "Unknown"),
    ("v0", _HUMAN, _H, _S.SINGLE, "###", None, "Unknown"),
    ("v1", _USER, _U, _S.TWO, " ", "</s>", "v1"),
    ("vicuna_v1", _USER, _U, _S.TWO, " ", "</s>", "v1"),
    ("llama_2", _LLAMA_2, _U, _S.LLAMA_2, "<s>", "</s>", "llama_v2"),
    ("mistral_instruct", "", _U, _S.LLAMA_2, "", "</s>", "llama_v2"),
    ("chatml_direct", _CHATML_DIRECT, _CHATML_ROLES, _S.MPT, "<|im_end|>", None, "mpt"),
    ("mistral_direct", _CHATML_DIRECT, _CHATML_ROLES, _S.MPT, "<|im_end|>", None, "mpt"),
    ("plain", "", _NONE, _S.PLAIN, "\n", None, "Unknown"),
    ("v0_plain", "", _NONE, _S.PLAIN, "\n", None, "Unknown"),
    ("llava_v0", _HUMAN, _H, _S.SINGLE, "###", None, "Unknown"),
    ("v0_mmtag", _MMTAG, _H, _S.SINGLE, "###", None, "v0_mmtag"),
    ("llava_v1", _HUMAN, _U, _S.TWO, " ", "</s>", "v1"),
    ("v1_mmtag", _MMTAG, _U, _S.TWO, " ", "</s>", "v1_mmtag"),
    ("llava_llama_2", _LLAVA_LLAMA_2, _U, _S.LLAMA_2, "<s>", "</s>", "llama_v2"),
    ("mpt", _MPT, _CHATML_ROLES, _S.MPT, "<|im_end|>", None, "mpt"),
    ("smollm2", _SMOLLM2, _SMOLLM2_ROLES, _S.MPT, "<|im_end|>", None, "mpt"),  # ours, for the mini model
)
_EXAMPLE_CARRIERS = ("default", "v0")


def _build(name: str, system: str, roles: tuple[str, str], *rest: Any) -> Conversation:
    messages = [list(turn) for turn in _EXAMPLE] if name in _EXAMPLE_CARRIERS else []
    return Conversation(system, roles, messages, len(messages), *rest)


conv_templates: dict[str, Conversation] = {name: _build(name, *rest) for name, *rest in _TEMPLATES}
"""Every template by name. Take a `.copy()` before appending."""

default_conversation: Conversation = conv_templates["vicuna_v1"]
"""What training uses where `--version` names no template."""

_BY_MODEL_NAME = (
    # the first part found in the lower-cased model name decides; the order matters
    ("smollm", "smollm2"),
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


_DEMO_ONLY = ("llava_v0", "llava_v1")
"""What a name means in LLaVA's demo. The models were trained, and are evaluated, with vicuna_v1."""


def conv_mode_for(model_name: str) -> str:
    """The template LLaVA's own runners (cli, run_llava) infer from a model's name; `llava_v0` if none fits.

    Our own small model (names that contain `smollm` or begin with `mini-`) takes `smollm2`.
    """
    name = model_name.lower()
    if name.startswith("mini-"):
        return "smollm2"
    return next((mode for part, mode in _BY_MODEL_NAME if part in name), "llava_v0")


def default_conv_mode(model_name: str, tokenizer: Any) -> str:
    """The template a model was trained with, as far as its tokenizer and its name tell.

    What `llava chat` and `llava eval` use without --conv-mode: as `conv_mode_for`, but vicuna_v1 in place of
    the two templates of LLaVA's demo, and `smollm2` for any model with SmolLM2's tokenizer.
    """
    if conv_templates["smollm2"].system in str(tokenizer.chat_template):
        return "smollm2"
    mode = conv_mode_for(model_name)
    return "vicuna_v1" if mode in _DEMO_ONLY else mode
