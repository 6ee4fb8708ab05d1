"""Prompt templates: how turns of a conversation become the one string a model was trained on.

The templates are data (`_TEMPLATES`), joined in one of five styles by `Conversation.get_prompt`. The strings
are part of the released weights: a changed character changes answers.

    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message(conv.roles[0], "<image>\\nWhat is this?")
    conv.append_message(conv.roles[1], None)          # the turn the model is to fill
    prompt = conv.get_prompt()
"""

import dataclasses
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

    Attributes:
        system: what stands before the first turn.
        roles: what the user's and the model's turns begin with.
        messages: `[role, message]` lists. A message is a string, `None` for the turn the model is to fill (an
            empty string renders like `None`, as the released models expect), or a tuple `(text, picture,
            ...)`, whose picture stands in front of its text if it is the first.
        offset: how many example turns belong to the template.
        sep, sep2: what ends a turn; `sep2` the model's where the two differ.
        version: the family of templates; training's masking reads "mmtag" in it.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"

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
        messages = self.messages
        if messages and isinstance(messages[0][1], tuple):
            messages = self._picture_first()
        turns = [(role, m[0] if isinstance(m, tuple) else m) for role, m in messages]
        # A user's turn ends with `sep`; so does the model's, unless the template has a `sep2`.
        ends = (self.sep, self.sep if self.sep_style is SeparatorStyle.SINGLE else self.sep2)
        match self.sep_style:
            case SeparatorStyle.SINGLE | SeparatorStyle.TWO:  # USER: question ASSISTANT: answer</s>
                prompt = self.system + self.sep
                for i, (role, text) in enumerate(turns):
                    prompt += f"{role}: {text}{ends[i % 2]}" if text else f"{role}:"
            case SeparatorStyle.MPT:  # <|im_start|>user\nquestion<|im_end|><|im_start|>assistant\n
                prompt = self.system + self.sep
                for role, text in turns:
                    prompt += role + text + self.sep if text else role
            case SeparatorStyle.PLAIN:  # the texts alone
                prompt = self.system
                for i, (_, text) in enumerate(turns):
                    prompt += text + ends[i % 2] if text else ""
            case SeparatorStyle.LLAMA_2:  # [INST] question [/INST] answer </s>
                first = self.roles[0]
                if turns and (turns[0][0] != first or not turns[0][1]):
                    raise ValueError(f"a LLAMA_2 prompt begins with a turn of {first} that is not empty")
                system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
                prompt = ""
                for i, (_, text) in enumerate(turns):
                    if text and i % 2:
                        prompt += f" {text} {self.sep2}"
                    elif text:
                        prompt += f"{self.sep}[INST] {'' if i else system}{text} [/INST]"
                # The tokenizer puts `<s>` itself. lstrip takes a set of characters, here on purpose: it is
                # what the models were trained with.
                prompt = prompt.lstrip(self.sep)
        return prompt

    def _picture_first(self) -> list[list[Any]]:
        """The turns, the picture of the first announced in front of its text."""
        role, (text, *_) = self.messages[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [[role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"], *self.messages[1:]]
        picture = [self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"]
        return [picture, [self.roles[1], "Received."], [role, text], *self.messages[1:]]


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
# Qwen2 and SmolLM2 have a newline after `<|im_end|>`. The role that follows carries it: an answer ends at the
# token.
_NEWLINE_ROLES = ("\n<|im_start|>user\n", "\n<|im_start|>assistant\n")
_QWEN_2 = "<|im_start|>system\nYou are a helpful assistant."
# `<|begin_of_text|>` is put by the tokenizer.
_LLAMA_3 = f"<|start_header_id|>system<|end_header_id|>\n\n{_LLAVA_LLAMA_2}"
_LLAMA_3_ROLES = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)

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
_TEMPLATES: tuple[tuple[Any, ...], ...] = (
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
    # Not in LLaVA-1.5: the language models of LLaVA-NeXT, and of the mini model.
    ("qwen_2", _QWEN_2, _NEWLINE_ROLES, _S.MPT, "<|im_end|>", None, "qwen_2"),
    ("llama_3", _LLAMA_3, _LLAMA_3_ROLES, _S.MPT, "<|eot_id|>", None, "llama_3"),
    ("smollm2", _SMOLLM2, _NEWLINE_ROLES, _S.MPT, "<|im_end|>", None, "mpt"),
)

conv_templates: dict[str, Conversation] = {
    name: Conversation(system, roles, [], 0, *rest) for name, system, roles, *rest in _TEMPLATES
}
"""Every template by name. Take a `.copy()` before appending."""

for _name in ("default", "v0"):
    conv_templates[_name].messages = [list(turn) for turn in _EXAMPLE]
    conv_templates[_name].offset = len(_EXAMPLE)

default_conversation: Conversation = conv_templates["vicuna_v1"]
"""What training uses where `--version` names no template."""

_BY_MODEL_NAME = (
    # the first part found in the lower-cased model name decides; the order matters
    ("smollm", "smollm2"),
    ("qwen", "qwen_2"),
    ("llama-3", "llama_3"),
    ("llama3", "llama_3"),
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
