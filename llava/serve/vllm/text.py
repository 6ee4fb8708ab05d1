"""From messages to ids as in training: the chat template out of our conversation templates, and the tokenizer."""

import dataclasses
import json
import re
from pathlib import Path

from transformers import BatchEncoding, LlamaTokenizer, PreTrainedTokenizerFast
from vllm.tokenizers.hf import get_cached_tokenizer

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates, default_conv_mode
from llava.mm_utils import get_model_name_from_path
from llava.serve.vllm.config import load_config

SYSTEM, QUESTION, ANSWER, NEXT_QUESTION = "\ue000", "\ue001", "\ue002", "\ue003"
"""Characters no template contains, put in place of what people write."""


def chat_template(conversation: Conversation, *, bos: str = "", image: str = DEFAULT_IMAGE_TOKEN) -> str:
    """A conversation template in Jinja, which vLLM renders: the same string as `Conversation.get_prompt`.

    The pieces between the turns are read off a rendered conversation of two questions, so there is no second
    copy of any prompt. A message of the role `system` replaces the template's own system prompt.

    Args:
        conversation: a template, e.g. `conv_templates["vicuna_v1"]`.
        bos: what the prompt begins with, where the tokenizer puts a token in front of every text.
        image: what stands for a picture in the prompt, where that is more than `<image>`.
    """
    turns = conversation.copy()
    for index, text in enumerate((QUESTION, ANSWER, NEXT_QUESTION, None)):
        turns.append_message(turns.roles[index % 2], text)
    head, rest = turns.get_prompt().split(QUESTION)
    to_answer, rest = rest.split(ANSWER)
    to_question, to_last_answer = rest.split(NEXT_QUESTION)
    # `<|im_start|>system\n` and the like are part of what our templates call the system prompt.
    tag = re.match(r"(<\|\w+\|>(system)?)*\s*", conversation.system).group()
    before, _, after = dataclasses.replace(turns, system=tag + SYSTEM).get_prompt().partition(SYSTEM)
    after = after.partition(QUESTION)[0]
    system = f"{json.dumps(bos + before)} + messages[0]['content'] + {json.dumps(after)}"
    if not after:
        system = "raise_exception('this prompt template has no place for a system message')"
    return (
        "{%- if messages[0]['role'] == 'system' -%}{{ " + system + " }}{%- set turns = messages[1:] -%}"
        "{%- else -%}{{ " + json.dumps(bos + head) + " }}{%- set turns = messages -%}{%- endif -%}"
        "{%- for message in turns -%}"
        "{%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}"
        "{{ raise_exception('messages alternate between user and assistant, the user first') }}{%- endif -%}"
        "{%- if message['role'] == 'assistant' -%}{{ " + json.dumps(to_answer) + " }}"
        "{%- elif not loop.first -%}{{ " + json.dumps(to_question) + " }}{%- endif -%}"
        "{{ message['content'].replace(" + f"{json.dumps(DEFAULT_IMAGE_TOKEN)}, {json.dumps(image)}" + ") }}"
        "{%- if loop.last and message['role'] == 'user' -%}{{ " + json.dumps(to_last_answer) + " }}{%- endif -%}"
        "{%- endfor -%}"
    )


class _PieceByPiece:
    """Encodes each piece between two `<image>` by itself, as `llava.mm_utils.tokenizer_image_token` does.

    Encoded whole, a sentencepiece tokenizer would lose the space in front of a piece and all ids after it
    would differ. A chat prompt spells its BOS and is encoded without special tokens; the model saw it encoded
    with them, which is not the same for every tokenizer, so the one is made the other.
    """

    def _encode_plus(self, text, *args, add_special_tokens: bool = True, **kwargs) -> BatchEncoding:
        encode = super()._encode_plus
        if isinstance(text, str):
            added = encode("", add_special_tokens=True)["input_ids"]
            if added and not add_special_tokens and text.startswith(self.bos_token):
                text, add_special_tokens = text.removeprefix(self.bos_token), True
            if DEFAULT_IMAGE_TOKEN in text:
                first, *rest = text.split(DEFAULT_IMAGE_TOKEN)
                ids = encode(first, add_special_tokens=add_special_tokens)["input_ids"]
                for piece in rest:
                    ids += [self.image_token_id, *encode(piece, add_special_tokens=False)["input_ids"]]
                return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return encode(text, *args, add_special_tokens=add_special_tokens, **kwargs)

    @property
    def image_token_id(self) -> int:
        """The id of `<image>`: there is one, so that K of them can stand where K visual tokens go."""
        return self.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


class _SentencePiece(_PieceByPiece, LlamaTokenizer):
    pass


class _ByteLevel(_PieceByPiece, PreTrainedTokenizerFast):
    pass


class LlavaTokenizer:
    """What vLLM's tokenizer registry calls: our loader, never AutoTokenizer."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args, truncation_side: str = "left", **kwargs):
        """The tokenizer with `<image>` and a chat template; vLLM's other keywords concern AutoTokenizer."""
        config, tokenizer = load_config(path)
        conversation = conv_templates[default_conv_mode(get_model_name_from_path(str(path)), tokenizer)]
        tokenizer.chat_template = chat_template(
            conversation, bos=spelled_bos(tokenizer), image=image_tag(config)
        )
        tokenizer.truncation_side = truncation_side
        tokenizer.__class__ = _SentencePiece if isinstance(tokenizer, LlamaTokenizer) else _ByteLevel
        return get_cached_tokenizer(tokenizer)


def spelled_bos(tokenizer) -> str:
    """The BOS in letters where the tokenizer puts one in front of every text, else nothing."""
    return tokenizer.bos_token if tokenizer("").input_ids else ""


def image_tag(config) -> str:
    """What stands for a picture in the prompts of this checkpoint."""
    if config.mm_use_im_start_end:
        return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return DEFAULT_IMAGE_TOKEN
