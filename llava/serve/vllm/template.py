"""From messages to a prompt: our conversation templates in Jinja, in which vLLM renders prompts."""

import dataclasses
import json
import re
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation

SYSTEM, QUESTION, ANSWER, NEXT_QUESTION = "\ue000", "\ue001", "\ue002", "\ue003"
"""Characters no template contains, put in place of what people write."""


TURNS = """
{%- if messages[0]['role'] == 'system' -%}
  {%- if not after_system -%}
    {{- raise_exception('this prompt template has no place for a system message') -}}
  {%- endif -%}
  {{- before_system + messages[0]['content'] + after_system -}}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {{- head -}}
  {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- set role = ['user', 'assistant'][loop.index0 % 2] -%}
  {%- if message['role'] != role -%}
    {{- raise_exception('messages alternate between user and assistant, the user first') -}}
  {%- endif -%}
  {%- if role == 'assistant' -%}{{- to_answer -}}{%- elif not loop.first -%}{{- to_question -}}{%- endif -%}
  {{- message['content'].replace('<image>', image) -}}
  {%- if loop.last and role == 'user' -%}{{- to_last_answer -}}{%- endif -%}
{%- endfor -%}
"""


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
    pieces = {
        "head": bos + head,
        "before_system": bos + before,
        "after_system": after.partition(QUESTION)[0],
        "to_answer": to_answer,
        "to_question": to_question,
        "to_last_answer": to_last_answer,
        "image": image,
    }
    known = "".join(f"{{%- set {name} = {json.dumps(piece)} -%}}" for name, piece in pieces.items())
    return known + TURNS


def spelled_bos(tokenizer: Any) -> str:
    """The BOS in letters where the tokenizer puts one in front of every text, else nothing."""
    return tokenizer.bos_token if tokenizer("").input_ids else ""
