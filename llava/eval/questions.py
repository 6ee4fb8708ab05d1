"""The questions of a benchmark: what one is, the files they are kept in, the labels they are scored with."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from llava.errors import UserError
from llava.eval.reading import jsonl, read_json, read_rows

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IMAGE_TAG = "<image>"
MIXED = "questions and labels are of different releases or splits"


@dataclass(frozen=True, slots=True)
class Sample:
    """One question."""

    id: str | int  # question_id with the type the question file gives it; answers files keep it
    text: str  # what the question file holds for the model
    image: Path | str | None  # str: a data URL, where the question file holds it; None: text only
    unit: str  # what the bootstrap draws, usually the image
    where: str  # file:line of the question
    category: str = ""
    reference: Any = None  # what is right, in the benchmark's own form; None: labels not there
    stem: str = ""  # of a multiple-choice question that can be asked in rotations: `text` without the options
    options: tuple[str, ...] = ()
    key: str = ""  # what tells it from all others: the id, unless the benchmark has its own `key`

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or str(self.id))

    @property
    def label(self) -> str:
        """How a person recognises it."""
        return f"{self.id} ({' '.join(self.text.split())[:60]!r})"


# --- how questions are told apart ---


def by_id(identifier: object, text: str) -> str:
    return str(identifier)


def by_id_and_question(identifier: object, text: str) -> str:
    """Where ids repeat (MME, TextVQA) or mean another question in another release (POPE)."""
    return f"{identifier} {bare_question(text)}"


def bare_question(text: str) -> str:
    """The question in a prompt: without OCR line, suffix or BLIP-style frame, blanks folded."""
    if text.startswith("OCR tokens: ") and "Question: " in text:
        return text.rpartition("Question: ")[2].partition(" Short answer:")[0]
    lines = (line.strip() for line in text.strip().removesuffix(SHORT.strip()).split("\n"))
    return " ".join(" ".join(line for line in lines if not line.startswith("Reference OCR token:")).split())


# --- question files ---


class Question(msgspec.Struct):
    """A row of LLaVA's question files."""

    question_id: int | str
    image: str
    text: str


def read_questions(
    file: Path, images: Path = Path(), key: Callable[[object, str], str] = by_id
) -> list[Sample]:
    """The rows of a question file as samples without reference."""
    return [
        Sample(
            row.question_id,
            row.text,
            images / row.image,
            unit=row.image,
            where=where,
            key=key(row.question_id, row.text),
        )
        for where, row in read_rows(file, Question)
    ]


def question_file(samples: Iterable[Sample]) -> str:
    """The question file of these samples."""
    return jsonl(
        {"question_id": x.id, "image": x.unit, "text": x.text, "category": x.category or "default"}
        for x in samples
    )


def with_tag(sample: Sample, text: str) -> str:
    return f"{IMAGE_TAG}\n{text}" if sample.image else text


class Turn(msgspec.Struct):
    value: str


class Conversation(msgspec.Struct):
    """An entry of ScienceQA's question file, which is in the format of training data."""

    id: int | str
    conversations: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    image: str | None = None


def read_conversations(file: Path, images: Path) -> list[Sample]:
    """The first turn of each entry, without the image tag, as samples without reference."""
    return [
        Sample(
            entry.id,
            entry.conversations[0].value.replace(IMAGE_TAG, "").strip(),
            images / entry.image if entry.image else None,
            unit=entry.image or str(entry.id),
            where=str(file),
        )
        for entry in read_json(file, list[Conversation])
    ]


def conversation_file(samples: Iterable[tuple[Sample, str]]) -> str:
    """The file of these samples and their answers."""
    entries = []
    for sample, answer in samples:
        asks = {"from": "human", "value": with_tag(sample, sample.text)}
        picture = {"image": sample.unit} if sample.image else {}
        turns = [asks, {"from": "gpt", "value": answer}]
        entries.append({"id": sample.id, **picture, "conversations": turns})
    return json.dumps(entries, indent=2)


def labelled(
    file: Path,
    read: Callable[[], list[Sample]],
    labels: Sequence[Sample] | None,
    source: Path | str,
    **how: bool,
) -> list[Sample]:
    """`with_labels` of what `read()` gives; where the question `file` is missing, the questions the labels
    were made for."""
    if labels and not file.exists():
        return list(labels)
    return with_labels(read(), labels, source, **how)


def with_labels(
    samples: Sequence[Sample],
    labels: Sequence[Sample] | None,
    source: Path | str,
    *,
    whole: bool,
    same_image: bool = False,
) -> list[Sample]:
    """`samples` of a question file with `reference` and `category` of the label of the same key.

    Args:
        labels: samples with references, made from the label files; equal keys go together in their order.
            None: the files are not there, and the samples stay as they are.
        source: where the labels come from, for a person.
        whole: every label must have a question.
        same_image: a question and its label must have the same image.

    Raises UserError where a question has no label or, with `whole`, a label has no question.
    """
    if labels is None:
        return list(samples)
    unused: dict[str, list[Sample]] = {}
    for label in labels:
        unused.setdefault(label.key, []).append(label)
    labelled = []
    for sample in samples:
        if not unused.get(sample.key):
            raise UserError(f"{sample.where}: question {sample.label} has no label in {source}; {MIXED}.")
        label = unused[sample.key].pop(0)
        if same_image and label.unit != sample.unit:
            shown = f"question {sample.label} is about {sample.unit}, in {source} about {label.unit}"
            raise UserError(f"{sample.where}: {shown}; {MIXED}.")
        labelled.append(replace(sample, reference=label.reference, category=label.category))
    left = [label for same_key in unused.values() for label in same_key]
    if whole and left:
        shown = f"{len(left):,} labels in {source} have no question, the first: {left[0].label}"
        raise UserError(f"{left[0].where}: {shown}; {MIXED}.")
    return labelled
