"""A conversation as ids and labels: what the model reads, and the part of it that is learnt.

Only answers (and the token that ends them) are learnt; every other label is IGNORE_INDEX. An answer is what a
prompt gains when its open turn is filled, so any template's answers are found by rendering it turn by turn; a
token belongs to the characters its first one lies in, which holds for any vocabulary, with or without BOS.

LLaVA re-tokenises each round by itself and corrects the counts for what its one vocabulary does at the seams.
Its rules are kept to the letter, as the released weights and everyone's results stand on them: a sample whose
text holds the template's own markers is masked as a whole.
"""

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llava.constants import (
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation
from llava.errors import UserError
from llava.mm_utils import image_tag

logger = logging.getLogger(__name__)

Turn = tuple[str, str]  # who speaks ("human" or "gpt"), and the text


def training_template(version: str) -> Conversation:
    """The template `--version` selects for training. `v0`, `v0.5` and unknown names mean `vicuna_v1`."""
    if version in ("v0", "v0.5"):
        return default_conversation
    return conv_templates.get(version, default_conversation)


def encode_conversation(
    conversations: Sequence[Mapping[str, str]],
    tokenizer: Any,
    version: str = "v1",
    has_image: bool = True,
    is_multimodal: bool = True,
    mm_use_im_start_end: bool = False,
    *,
    several_images: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels) of one conversation, both int64 [n].

    conversations: turns as in LLaVA's JSON, `{"from": "human" | "gpt", "value": text}`, taking turns; a first
        turn from gpt is dropped.
    version: the template, see `training_template`.
    has_image: `<image>` in the text stands for an image: IMAGE_TOKEN_INDEX in the ids. In a multimodal run it
        is moved to the front of its turn (several in one turn become one). Without an image, ids end at the
        tokenizer's model_max_length; with one they do not, the collator cuts them.
    mm_use_im_start_end: `<image>` is wrapped in the two tokens, which the tokenizer has to know.
    several_images: each `<image>` stays where it stands; for samples with a list of images.

    Raises UserError for turns that are empty, from someone else or out of order. A text that holds the
    template's markers is fully masked, with a warning in the log.
    """
    template = training_template(version)
    turns = [checked_turn(turn) for turn in conversations]
    if has_image and is_multimodal:
        wrapped = mm_use_im_start_end, "mmtag" in template.version
        turns = [(who, _place_image(text, *wrapped, several_images)) for who, text in turns]

    if template.sep_style is SeparatorStyle.PLAIN:
        return _encode_plain(turns, tokenizer, template)
    if template.sep_style is SeparatorStyle.SINGLE:
        return _encode_headed(turns, tokenizer, template, has_image)

    messages = [[template.roles[i % 2], said] for i, (_, said) in enumerate(taking_turns(turns))]
    text = _render(template, messages)
    ids, starts = _tokenise(text, tokenizer, has_image)
    labels = _labels(ids, starts, answer_spans(template, messages))
    limit = tokenizer.model_max_length
    understood = bisect_left(starts, _understood_to(text, template, messages))
    problem = None
    if template.sep_style is SeparatorStyle.MPT and len(tokenizer.tokenize(template.sep)) != 1:
        problem = f"the tokenizer does not know {template.sep}"
    elif understood < min(len(ids), limit):
        problem = "it has an empty turn, or a text that holds the template's own markers"
    if problem:
        logger.warning("a conversation takes no part in the loss: %s (%.80r)", problem, turns[0][1])
        understood = 0
    labels[understood:] = [IGNORE_INDEX] * (len(labels) - understood)
    end = None if has_image else limit
    return torch.tensor(ids[:end], dtype=torch.long), torch.tensor(labels[:end], dtype=torch.long)


# ------------------------------------------------------------------------------------------------- turns


def checked_turn(turn: Mapping[str, str]) -> Turn:
    who, text = turn.get("from"), turn.get("value")
    if who not in ("human", "gpt"):
        raise UserError(f'a turn is from {who!r}; "from" is "human" or "gpt".')
    if not isinstance(text, str):
        raise UserError(f'a turn of {who} has no text; "value" is a string.')
    return who, text


def _place_image(text: str, im_start_end: bool, mmtag: bool, several: bool) -> str:
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    if not several:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    tag = image_tag(im_start_end)
    if mmtag:
        tag = f"<Image>{tag}</Image>"
    return text.replace(DEFAULT_IMAGE_TOKEN, tag)


def taking_turns(turns: list[Turn]) -> list[Turn]:
    """The turns, a first one from gpt left out. Raises UserError unless human and gpt take turns."""
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns:
        raise UserError("the conversation has no turn from human; it needs a question and an answer.")
    for i, (who, _) in enumerate(turns):
        if who != ("human", "gpt")[i % 2]:
            raise UserError(f"turn {i + 1} is from {who}; human and gpt have to take turns, human first.")
    return turns


def _render(template: Conversation, messages: list[list[Any]]) -> str:
    try:
        return dataclasses.replace(template, messages=messages).get_prompt()
    except ValueError as error:
        raise UserError(f"{error}; give the first turn a text.") from None


# ------------------------------------------------------------------------------------------ ids and spans


def _tokenise(text: str, tokenizer: Any, has_image: bool) -> tuple[list[int], list[int]]:
    """Ids as `tokenizer_image_token` gives them, and for each the index of its first character in `text`."""
    bos = len(tokenizer("").input_ids)
    ids: list[int] = []
    starts: list[int] = []
    position = 0
    for i, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN) if has_image else [text]):
        if i > 0:
            ids.append(IMAGE_TOKEN_INDEX)
            starts.append(position)
            position += len(DEFAULT_IMAGE_TOKEN)
        encoded = tokenizer(piece, return_offsets_mapping=True, verbose=False)
        drop = bos if i > 0 else 0
        ids += encoded.input_ids[drop:]
        starts += [position + start for start, _ in encoded.offset_mapping[drop:]]
        position += len(piece)
    return ids, starts


def _labels(ids: list[int], starts: list[int], spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    for begin, end in spans:
        first, last = bisect_left(starts, begin), bisect_left(starts, end)
        labels[first:last] = ids[first:last]
    return labels


def answer_spans(template: Conversation, messages: list[list[str]]) -> list[tuple[int, int]]:
    """Characters [begin, end) of each answer, with the separator that ends it, in the prompt of `messages`.

    An answer begins where the prompt that asks for it ends. The blank after `ASSISTANT:` thus belongs to it,
    as it is tokenised as a part of the answer's first word.
    """
    asked = [[*messages[:i], [messages[i][0], None]] for i in range(1, len(messages), 2)]
    return [
        (len(_render(template, turns)), len(_render(template, messages[: len(turns)]))) for turns in asked
    ]


def _understood_to(text: str, template: Conversation, messages: list[list[str]]) -> int:
    """How many characters of a prompt can be cut into its turns again by the template's markers alone."""
    if template.sep_style is SeparatorStyle.MPT:  # each turn ends with the separator
        whole = _render(template, [[role, "x"] for role in template.roles] * ((len(messages) + 1) // 2))
        return len(text) if text.count(template.sep) == whole.count(template.sep) else 0
    # LLaVA's reading: rounds end with sep2, and in each the marker stands once between question and answer.
    llama_2 = template.sep_style is SeparatorStyle.LLAMA_2
    marker = "[/INST] " if llama_2 else f"{template.sep}{template.roles[1]}: "
    position = 0
    for one in text.split(template.sep2):
        if one.count(marker) != 1:
            break
        position += len(one) + len(template.sep2)
    return position


# ------------------------------------------------------------------------------- the two other formats


def _encode_plain(
    turns: list[Turn], tokenizer: Any, template: Conversation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 1: the image and its caption, nothing else. The caption and the newline after it are learnt."""
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0][1]:
        raise UserError(
            "version plain takes an image and its caption: two turns, <image> in the first; "
            "conversations train with version v1."
        )
    text = DEFAULT_IMAGE_TOKEN + turns[1][1] + template.sep
    ids, starts = _tokenise(text, tokenizer, has_image=True)
    labels = _labels(ids, starts, [(len(DEFAULT_IMAGE_TOKEN), len(text))])
    return torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long)


def _encode_headed(
    turns: list[Turn], tokenizer: Any, template: Conversation, has_image: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oldest format: a header, then `### ROLE: text` lines.

    Here LLaVA's counting is kept as it is, since its labels are no spans: each line is measured by itself,
    BOS included, and the first two tokens of a question are learnt.
    """
    names = {"human": template.roles[0], "gpt": template.roles[1]}
    lines = [template.system + "\n\n", *(f"### {names[who]}: {text}\n" for who, text in turns)]
    limit = None if has_image else tokenizer.model_max_length
    ids = _tokenise("".join(lines) + "### ", tokenizer, has_image)[0][:limit]
    lengths = [len(_tokenise(line, tokenizer, has_image)[0][:limit]) for line in lines]
    labels = list(ids)
    position = lengths[0]
    labels[:position] = [IGNORE_INDEX] * len(labels[:position])
    for (who, _), length in zip(turns, lengths[1:], strict=True):
        if who == "human":
            question = slice(position + 2, max(position + length, position + 2))
            labels[question] = [IGNORE_INDEX] * len(labels[question])
        position += length
    return torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long)
