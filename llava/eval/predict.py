"""The one predict loop: questions in, lines of an answers file out.

Work comes in units: some dozens of images with all their questions. Within a unit each distinct image is
decoded (in worker processes, ahead of time), encoded and reduced once, and its visual tokens serve all its
questions: the reducer never reads the text, so this is exact. The unit's questions are then sorted by
length, cut into batches that fit a budget of tokens, and answered; each batch is written as soon as it is
there, and joined by id later.

Batches change nothing: prompts are padded on the left, positions count from each prompt's own start, and in
float32 the answers are those of asking one question at a time (tested).
"""

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.errors import UserError
from llava.eval.benchmarks.base import Embedded
from llava.eval.store import Question, Store, unit_size, units_of
from llava.mm_utils import load_image, load_image_from_base64, process_images, tokenizer_image_token

T = TypeVar("T")
CPU_BATCH_TOKENS = 8192
IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class Request:
    """One question for the model, and what its line in the answers file shall hold besides the answer."""

    id: str | int
    text: str  # the user's turn, without the image tag
    image: Path | Embedded | None
    recorded: str  # stored as `prompt`
    before: dict[str, Any] = field(default_factory=dict)  # keys that stand after question_id
    after: dict[str, Any] = field(default_factory=dict)  # keys that stand after text


@dataclass(frozen=True)
class Generation:
    """How answers are made; greedy unless a temperature is given."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        sampling = (
            {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            if self.temperature > 0
            else {"do_sample": False}
        )
        return {
            **sampling,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "use_cache": True,
        }


@dataclass(frozen=True)
class PixelRecipe:
    """What `process_images` reads of a config."""

    image_aspect_ratio: str | None
    image_grid_pinpoints: Any = None


@dataclass(frozen=True)
class Pixels:
    """A processed image on its way from a worker: [3, S, S], or [crops, 3, S, S] for anyres; its (width,
    height).
    """

    values: np.ndarray
    size: tuple[int, int]


class Answerer:
    """A loaded model as the loop needs it: prompts, visual tokens, answers.

    `image_aspect_ratio` replaces the checkpoint's own. `batch_tokens` bounds prompts and answers of a
    batch, in tokens with padding; it is halved, for the rest of the run, whenever memory runs out.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        conv_mode: str,
        generation: Generation,
        *,
        image_aspect_ratio: str | None = None,
        batch_tokens: int | None = None,
    ):
        if conv_mode not in conv_templates:
            raise UserError(
                f"there is no conversation template {conv_mode!r}: {', '.join(sorted(conv_templates))}."
            )
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.conv_mode, self.generation = conv_mode, generation
        config = model.config
        self.recipe = PixelRecipe(
            image_aspect_ratio or config.image_aspect_ratio, config.image_grid_pinpoints
        )
        # Tiles of an image are joined after the projector there: such tokens cannot be kept before it.
        self.joins_tiles = config.mm_patch_merge_type.startswith("spatial") and model.reducer.name == "none"
        self.batch_tokens = batch_tokens or self._room()
        self.images_at_once = IMAGES_AT_ONCE
        self.stop = self._stop_string()

    def _stop_string(self) -> str | None:
        """What ends an answer in this template, where the tokenizer's own end of sequence does not."""
        stop = conv_templates[self.conv_mode].stop_string
        return None if stop == self.tokenizer.eos_token else stop

    def _room(self) -> int:
        """Tokens whose keys and values fill half of the free memory, the other half being for everything
        else.
        """
        device = self.model.device
        if device.type != "cuda":
            return CPU_BATCH_TOKENS
        config = self.model.config
        width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        bytes_a_token = 2 * config.num_hidden_layers * width * self.model.dtype.itemsize
        free, _ = torch.cuda.mem_get_info(device)
        return max(CPU_BATCH_TOKENS, free // 2 // bytes_a_token)

    @property
    def tag(self) -> str:
        """What stands for an image in a prompt."""
        if self.model.config.mm_use_im_start_end:
            return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        return DEFAULT_IMAGE_TOKEN

    def prompt(self, text: str, with_image: bool) -> str:
        """The whole prompt, as the weights were trained on it."""
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], f"{self.tag}\n{text}" if with_image else text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def ids(self, text: str, with_image: bool) -> Tensor:
        """[L] int64, IMAGE_TOKEN_INDEX where the image goes."""
        return tokenizer_image_token(self.prompt(text, with_image), self.tokenizer, return_tensors="pt")

    def encode(self, images: Sequence[Pixels]) -> list[Tensor]:
        """[K_i, C] visual tokens of each image, those of its crops one after the other."""
        tower = self.model.get_vision_tower()
        crops = [torch.from_numpy(image.values) for image in images]
        crops = [crop if crop.ndim == 4 else crop[None] for crop in crops]
        views = torch.cat(crops) if crops else torch.empty(0)
        blocks: list[Tensor] = []
        while len(blocks) < len(views):
            part = views[len(blocks) : len(blocks) + self.images_at_once]
            try:
                blocks += self.model.encode_images(part.to(tower.device, tower.dtype))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.images_at_once == 1:
                    raise
                self.images_at_once //= 2
                free_memory()
        per_image = iter(blocks)
        return [torch.cat([next(per_image) for _ in crop]) for crop in crops]

    def visual_length(self, visual: "Tensor | Pixels") -> int:
        """Positions an image takes in the prompt (at most, where its tiles are yet to be joined)."""
        if isinstance(visual, Pixels):
            crops = len(visual.values) if visual.values.ndim == 4 else 1
            side = self.model.get_vision_tower().num_patches_per_side
            return crops * side * (side + 1)
        return len(visual)

    @torch.inference_mode()
    def answer(self, ids: Sequence[Tensor], visual: Sequence["Tensor | Pixels"]) -> list[str]:
        """The answers of a batch; `visual` in the order of the placeholders, pixels where `joins_tiles`."""
        if self.joins_tiles:
            tower = self.model.get_vision_tower()
            pixels = [torch.from_numpy(image.values).to(tower.device, tower.dtype) for image in visual]
            images = {"images": pixels, "image_sizes": [image.size for image in visual]}
        else:
            images = {"visual_tokens": list(visual)}
        stops = {"stop_strings": [self.stop], "tokenizer": self.tokenizer} if self.stop else {}
        new = self.model.generate(
            list(ids),
            **(images if visual else {}),
            **stops,
            **self.generation.arguments,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts = (text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True))
        return [text.removesuffix(self.stop).strip() if self.stop else text for text in texts]


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- from files to pixels, in worker processes ---


class _Decode(Dataset):
    """Pixels of image n, or why there are none; a unit's number goes through as it is."""

    def __init__(self, images: Sequence[Path | Embedded], image_processor: Any, recipe: PixelRecipe):
        self.images, self.image_processor, self.recipe = images, image_processor, recipe

    def __getitem__(self, item: tuple[str, int]) -> Any:
        kind, number = item
        return number if kind == "unit" else decode(self.images[number], self.image_processor, self.recipe)


def decode(image: Path | Embedded, image_processor: Any, recipe: PixelRecipe) -> Pixels | str:
    """The processed image, or one sentence about what is wrong with it."""
    try:
        picture = load_image_from_base64(image.base64) if isinstance(image, Embedded) else load_image(image)
        values = process_images([picture], image_processor, recipe)[0]
    except UserError as error:
        return str(error)
    return Pixels(values.numpy(), picture.size)


def _as_is(value: T) -> T:
    return value


# --- the loop ---


def questions_of(requests: Sequence[Request]) -> list[Question]:
    """The requests as the store knows them, cut into units of whole images."""
    groups: list[object] = [request.image or index for index, request in enumerate(requests)]
    units = units_of(groups, unit_size(len(requests)))
    return [
        Question(request.id, request.recorded, unit) for request, unit in zip(requests, units, strict=True)
    ]


def predict(
    requests: Sequence[Request],
    answerer: Answerer,
    store: Store,
    model_id: str,
    *,
    decode_workers: int = 1,
    show_progress: bool = True,
) -> None:
    """Answers what is open in `store`, together with all other processes that do the same.

    Returns when every question has an answer or a recorded problem, from whichever process. `store` was
    made of `questions_of(requests)`.
    """
    if store.open_questions:
        refuse_if_no_image_is_there(requests)
    total = len(requests)
    with tqdm(total=total, unit="q", disable=not show_progress, smoothing=0.05) as bar:
        _show(bar, store)
        while store.open_questions:
            since = time.perf_counter()
            for unit, images in _decoded_units(requests, answerer, store, decode_workers):
                asked = len(store.pending(unit))
                tokens = _answer_unit(unit, images, requests, answerer, store, model_id)
                now = time.perf_counter()
                store.note(
                    {
                        "unit": unit,
                        "questions": asked,
                        "visual_tokens": dict(Counter(map(str, tokens))),
                        "seconds": round(now - since, 4),
                        "process": os.getpid(),
                    }
                )
                since = now
                store.release(unit)
                _show(bar, store)
            if store.open_questions:  # in other hands
                store.wait()
                _show(bar, store)


def refuse_if_no_image_is_there(requests: Sequence[Request]) -> None:
    """One missing image is a problem of its questions; a missing folder is a mistake of the command."""
    files = {request.image for request in requests if isinstance(request.image, Path)}
    if files and not any(file.exists() for file in files):
        raise UserError(f"none of the {len(files):,} images is there; the first would be {min(files)}.")


def _show(bar: tqdm, store: Store) -> None:
    bar.n = len(store.questions) - store.open_questions
    bar.set_postfix_str(f"{len(store.problems)} problems" if store.problems else "")


def _decoded_units(
    requests: Sequence[Request], answerer: Answerer, store: Store, workers: int
) -> Iterator[tuple[int, dict[Path | Embedded, Pixels | str]]]:
    """(unit, its images) of every unit this process could claim; images are decoded some way ahead."""
    images = list(dict.fromkeys(request.image for request in requests if request.image is not None))
    numbers = {image: number for number, image in enumerate(images)}
    wanted: dict[int, list[int]] = {}

    def items() -> Iterator[tuple[str, int]]:
        for unit in store.claims():
            needed = dict.fromkeys(requests[index].image for index in store.pending(unit))
            wanted[unit] = [numbers[image] for image in needed if image is not None]
            yield from (("image", number) for number in wanted[unit])
            yield "unit", unit

    loader = DataLoader(
        _Decode(images, answerer.image_processor, answerer.recipe),
        batch_size=None,
        sampler=items(),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        collate_fn=_as_is,
    )
    arrived: list[Pixels | str] = []
    for result in loader:
        if isinstance(result, int):
            known = (images[number] for number in wanted.pop(result))
            yield result, dict(zip(known, arrived, strict=True))
            arrived = []
        else:
            arrived.append(result)


@dataclass(frozen=True)
class _Ready:
    """A question with its prompt's ids and its image's tokens."""

    index: int
    ids: Tensor
    visual: tuple[Tensor | Pixels, ...]
    length: int


def _answer_unit(
    unit: int,
    images: dict[Path | Embedded, Pixels | str],
    requests: Sequence[Request],
    answerer: Answerer,
    store: Store,
    model_id: str,
) -> list[int]:
    """Answers the open questions of a unit; returns how many tokens each of its images took."""
    whole = {image: pixels for image, pixels in images.items() if isinstance(pixels, Pixels)}
    if answerer.joins_tiles:
        visual: dict[Path | Embedded, Tensor | Pixels] = dict(whole)
    else:
        visual = dict(zip(whole, answerer.encode(list(whole.values())), strict=True))
    ready = []
    for index in store.pending(unit):
        request = requests[index]
        if request.image is not None and request.image not in visual:
            store.fail(index, str(images[request.image]))
            continue
        ids = answerer.ids(request.text, request.image is not None)
        placeholders = int((ids == IMAGE_TOKEN_INDEX).sum())
        if placeholders != (request.image is not None):
            store.fail(index, f"the question itself contains {DEFAULT_IMAGE_TOKEN}")
            continue
        blocks = (visual[request.image],) if request.image is not None else ()
        length = len(ids) - placeholders + sum(map(answerer.visual_length, blocks))
        ready.append(_Ready(index, ids, blocks, length))

    def write(batch: Sequence[_Ready], texts: Sequence[str]) -> None:
        rows = {
            one.index: answer_row(requests[one.index], text, model_id)
            for one, text in zip(batch, texts, strict=True)
        }
        store.write(rows)

    if answerer.generation.temperature > 0:
        torch.manual_seed(answerer.generation.seed + unit)  # whichever process it falls to
    _in_batches(ready, answerer, write)
    return [answerer.visual_length(block) for block in visual.values()]


def _in_batches(
    ready: Sequence[_Ready], answerer: Answerer, write: Callable[[Sequence[_Ready], Sequence[str]], None]
) -> None:
    """Longest first, so that memory runs out early if it does; then the budget is halved for good."""
    rest = sorted(ready, key=lambda one: (-one.length, one.index))
    new = answerer.generation.max_new_tokens
    while rest:
        cost = rest[0].length + new
        batch = rest[: max(1, answerer.batch_tokens // cost)]
        try:
            texts = answerer.answer(
                [one.ids for one in batch], [block for one in batch for block in one.visual]
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise UserError(f"one prompt of {rest[0].length} tokens does not fit in memory.") from error
            answerer.batch_tokens = len(batch) * cost // 2
            free_memory()
            continue
        write(batch, texts)
        rest = rest[len(batch) :]


def answer_row(request: Request, text: str, model_id: str) -> dict[str, Any]:
    """A line of the answers file, its keys in LLaVA's order."""
    return {
        "question_id": request.id,
        **request.before,
        "prompt": request.recorded,
        "text": text,
        **request.after,
        "answer_id": short_uuid(),
        "model_id": model_id,
        "metadata": {},
    }


def short_uuid() -> str:
    """22 characters of an alphabet without look-alikes, as the shortuuid package writes a random UUID."""
    alphabet = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    value, digits = uuid.uuid4().int, ""
    for _ in range(22):
        value, digit = divmod(value, len(alphabet))
        digits = alphabet[digit] + digits
    return digits


# --- what the run took ---


NOTHING: dict[str, Any] = {"questions": 0, "answered": 0, "problems": [], "images": 0, "device_seconds": 0.0}
"""The summary of a run without questions."""


def summary(store: Store) -> dict[str, Any]:
    """Tokens, time and problems of all processes and all sittings, out of the log."""
    tokens: Counter[int] = Counter()
    seconds, questions = 0.0, 0
    for event in store.events():
        if "unit" in event:
            tokens.update({int(count): images for count, images in event["visual_tokens"].items()})
            seconds += event["seconds"]
            questions += event["questions"]
    images = sum(tokens.values())
    ordered = np.repeat(sorted(tokens), [tokens[count] for count in sorted(tokens)])
    return {
        "questions": len(store.questions),
        "answered": len(store.answered),
        "problems": [
            {"question_id": store.questions[index].id, "problem": problem}
            for index, problem in sorted(store.problems.items())
            if index not in store.answered
        ],
        "images": images,
        "visual_tokens": {
            "mean": float(ordered.mean()),
            "p50": float(np.percentile(ordered, 50)),
            "p95": float(np.percentile(ordered, 95)),
            "max": int(ordered.max()),
        }
        if images
        else None,
        "device_seconds": round(seconds, 2),
        "images_per_second": images / seconds if seconds else None,
        "questions_per_second": questions / seconds if seconds else None,
    }
