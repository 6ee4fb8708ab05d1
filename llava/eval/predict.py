"""The one predict loop: questions in, lines of an answers file out.

Work comes in units: some dozens of images with all their questions. Within a unit each distinct image is
decoded (in worker processes, ahead of time), encoded and reduced once: the reducer never reads the text. The
language model too sees it once: the prompts of all questions about it begin alike (system prompt, then its
visual tokens), so the keys and values of that beginning are computed once and shared (llava/model/prefix.py),
and a question costs its own words only. One code path for one question an image and for many.

What is computed together is of similar length, so that little of it is padding, and fits a budget of keys and
values (`batches`). Each batch is written as soon as it is there, and joined by id later. A unit's images go
when the unit is done: units are whole images, so nothing would be found again in a cache across them.

All of this changes nothing: attention is causal, padding is masked, positions count from each prompt's own
start, and in float32 the answers are those of asking one question at a time (tested).
"""

import multiprocessing
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.errors import UserError
from llava.eval.benchmarks.base import Embedded, MissingFile
from llava.eval.store import Question, Store, unit_size, units_of
from llava.mm_utils import load_image, load_image_from_base64, process_images, tokenizer_image_token
from llava.model import prefix
from llava.model.prefix import Prefix

logger = logging.get_logger(__name__)
T = TypeVar("T")
CPU_BATCH_TOKENS = 8192
IMAGES_AT_ONCE = 32
TOKENS_AT_ONCE = 4096
"""More than this in one forward pass makes no device faster, and takes memory."""
PASS_TOKENS = 32
"""What a pass costs beside its tokens, in tokens: so much padding is cheaper than a pass of its own."""


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

    `image_aspect_ratio` replaces the checkpoint's own. `batch_tokens` bounds the keys and values alive at a
    time, in tokens with padding: those of the images in hand, and of the prompts and answers of a batch. It
    is halved, for the rest of the run, whenever memory runs out.
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

    @cached_property
    def head(self) -> Tensor:
        """[H] int64, the ids in front of the image, the same in every prompt with one."""
        ids = self.ids("", with_image=True)
        return ids[: int((ids == IMAGE_TOKEN_INDEX).nonzero()[0])]

    @cached_property
    @torch.inference_mode()
    def start(self) -> Prefix:
        """What all prompts with an image begin with."""
        return prefix.begin(self.model, self.head)

    @torch.inference_mode()
    def see(self, images: Sequence["Tensor | Pixels"]) -> Prefix:
        """The beginnings of prompts about these images: a row each, up to and with the visual tokens.

        Images in descending order of `visual_length` are computed with little padding.
        """
        blocks = self._embed(images)
        parts = batches([len(block) for block in blocks], lambda longest: len(blocks))
        return prefix.join(
            [prefix.extend(self.model, self.start, blocks[part], [0] * len(blocks[part])) for part in parts]
        )

    @torch.inference_mode()
    def answer(self, ids: Sequence[Tensor], visual: Sequence["Tensor | Pixels"]) -> list[str]:
        """The answers of whole prompts, with any number of images each: `visual` in the order of the
        placeholders, pixels where `joins_tiles`.
        """
        embeds = self._embed(visual) if visual else None
        return self._texts(self.model.generate(list(ids), visual_embeds=embeds, **self._arguments))

    def _embed(self, images: Sequence["Tensor | Pixels"]) -> list[Tensor]:
        """[K_i, hidden] of each image."""
        if not self.joins_tiles:
            return self.model.project(images)
        tower = self.model.get_vision_tower()
        pixels = [torch.from_numpy(image.values).to(tower.device, tower.dtype) for image in images]
        # One by one: each is a pass over several crops.
        return [
            self.model.embed_images([crops], [image.size])[0]
            for crops, image in zip(pixels, images, strict=True)
        ]

    def cut(self, ids: Sequence[Tensor], beginnings: Prefix, rows: Sequence[int]) -> list[Tensor]:
        """The ids without what goes beyond the checkpoint's longest prompt, as in training."""
        longest = self.model.config.tokenizer_model_max_length
        if longest is None:
            return list(ids)
        lengths = beginnings.mask.sum(1).tolist()
        room = [max(1, longest - lengths[row]) for row in rows]
        if any(len(one) > most for one, most in zip(ids, room, strict=True)):
            logger.warning_once(f"some prompts are cut to {longest} tokens (tokenizer_model_max_length)")
        return [one[:most] for one, most in zip(ids, room, strict=True)]

    @torch.inference_mode()
    def answer_after(self, beginnings: Prefix, ids: Sequence[Tensor], rows: Sequence[int]) -> list[str]:
        """The answers of prompts that begin with row rows[i] of `beginnings` and end with ids[i]."""
        return self._texts(prefix.answer(self.model, beginnings, ids, rows, **self._arguments))

    @property
    def _arguments(self) -> dict[str, Any]:
        stops = {"stop_strings": [self.stop], "tokenizer": self.tokenizer} if self.stop else {}
        return {**stops, **self.generation.arguments, "pad_token_id": self.tokenizer.pad_token_id}

    def _texts(self, new: Tensor) -> list[str]:
        texts = (text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True))
        return [text.removesuffix(self.stop).strip() if self.stop else text for text in texts]


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches(lengths: Sequence[int], fit: Callable[[int], int]) -> list[slice]:
    """Cuts rows of these lengths, best in order of length, into what is computed together.

    A batch holds at most `fit(its longest)` rows and TOKENS_AT_ONCE tokens, but one row in any case. Of all
    such cuts it is the one with the fewest tokens, padding and PASS_TOKENS for each batch included.
    """
    cost = [0] + [sys.maxsize] * len(lengths)  # of the rows up to here
    begin = [0] * (len(lengths) + 1)  # of the batch that ends here
    for start in range(len(lengths)):
        longest = 0
        for end in range(start + 1, len(lengths) + 1):
            longest, rows = max(longest, lengths[end - 1]), end - start
            if rows > 1 and (rows > fit(longest) or rows * longest > TOKENS_AT_ONCE):
                break
            if (total := cost[start] + rows * longest + PASS_TOKENS) < cost[end]:
                cost[end], begin[end] = total, start
    parts = []
    end = len(lengths)
    while end > 0:
        parts.append(slice(begin[end], end))
        end = begin[end]
    return parts[::-1]


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


def in_workers(dataset: Dataset, items: Iterable[Any], workers: int, ahead: int) -> DataLoader:
    """dataset[item] of each item, in their order, made in processes, some `ahead` of who takes them."""
    workers = min(workers, ahead)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        prefetch_factor=min(8, ahead // workers) if workers else None,
        collate_fn=_as_is,
        worker_init_fn=die_with_parent,
    )


def _as_is(value: T) -> T:
    return value


def die_with_parent(worker: int = 0) -> None:
    """For a process that another one started: end when that one is killed.

    A decoder would else wait for ever for someone to read what it has decoded.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- the loop ---


def questions_of(requests: Sequence[Request], processes: int = 1) -> list[Question]:
    """The requests as the store knows them, cut into units of whole images to be shared by `processes`."""
    groups: list[object] = [request.image or index for index, request in enumerate(requests)]
    units = units_of(groups, unit_size(len(requests), processes))
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
        raise MissingFile(f"none of the {len(files):,} images is there; the first would be {min(files)}.")


def _show(bar: tqdm, store: Store) -> None:
    bar.n = len(store.questions) - store.open_questions
    bar.set_postfix_str(f"{len(store.problems)} problems" if store.problems else "")


def _decoded_units(
    requests: Sequence[Request], answerer: Answerer, store: Store, workers: int
) -> Iterator[tuple[int, dict[Path | Embedded, Pixels | str]]]:
    """(unit, its images) of every unit this process could claim.

    Images are decoded about one unit ahead: what is decoded is claimed, and out of the others' reach.
    """
    images = list(dict.fromkeys(request.image for request in requests if request.image is not None))
    numbers = {image: number for number, image in enumerate(images)}
    wanted: dict[int, list[int]] = {}
    a_unit = max(1, len(images) // len(store.units))

    def items() -> Iterator[tuple[str, int]]:
        for unit in store.claims():
            needed = dict.fromkeys(requests[index].image for index in store.pending(unit))
            wanted[unit] = [numbers[image] for image in needed if image is not None]
            yield from (("image", number) for number in wanted[unit])
            yield "unit", unit

    decode_all = _Decode(images, answerer.image_processor, answerer.recipe)
    arrived: list[Pixels | str] = []
    for result in in_workers(decode_all, items(), workers, ahead=a_unit):
        if isinstance(result, int):
            known = (images[number] for number in wanted.pop(result))
            yield result, dict(zip(known, arrived, strict=True))
            arrived = []
        else:
            arrived.append(result)


@dataclass(frozen=True)
class Ready:
    """A question whose image is there, if it has one.

    Attributes:
        ids: those that follow the beginning it shares with others.
        shares_head: that beginning is the system prompt (and the image, if any); False: there is none.
    """

    index: int
    image: Path | Embedded | None
    ids: Tensor
    shares_head: bool


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
        # Without an image the last id of the system prompt may be another: a space joined to the first word.
        head = len(answerer.head)
        shares_head = len(ids) > head and ids[:head].equal(answerer.head)
        after = ids[head + placeholders :] if shares_head else ids
        ready.append(Ready(index, request.image, after, shares_head))

    def write(batch: Sequence[Ready], texts: Sequence[str]) -> None:
        rows = {
            one.index: answer_row(requests[one.index], text, model_id)
            for one, text in zip(batch, texts, strict=True)
        }
        store.write(rows)

    if answerer.generation.temperature > 0:
        torch.manual_seed(answerer.generation.seed + unit)  # whichever process it falls to
    answer_all(ready, visual, answerer, write)
    return [answerer.visual_length(block) for block in visual.values()]


def answer_all(
    ready: Sequence[Ready],
    visual: dict[Path | Embedded, "Tensor | Pixels"],
    answerer: Answerer,
    write: Callable[[Sequence[Ready], Sequence[str]], None],
) -> None:
    """Where memory runs out, the budget becomes half of what was in use, and the rest begins anew."""
    waiting = {one.index: one for one in ready}

    def done(batch: Sequence[Ready], texts: Sequence[str]) -> None:
        write(batch, texts)
        for one in batch:
            del waiting[one.index]

    while waiting:
        use = _Use()
        try:
            for together in _hands(list(waiting.values()), visual, answerer):
                _answer_hand(together, visual, answerer, use, done)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if use.is_least:
                raise UserError(f"one prompt of {use.tokens} tokens does not fit in memory.") from error
        else:
            continue
        answerer.batch_tokens = use.tokens // 2  # here the error, and what it held, is gone
        free_memory()


@dataclass
class _Use:
    """Tokens whose keys and values are in memory; whether it could not be done with fewer."""

    tokens: int = 0
    is_least: bool = False


def _hands(
    ready: Sequence[Ready], visual: dict[Path | Embedded, "Tensor | Pixels"], answerer: Answerer
) -> Iterator[list[Ready]]:
    """The questions in groups whose beginnings are held together, in half of the budget.

    Images of many tokens come first, so that memory runs out early if it does.
    """
    about: dict[Path | Embedded, list[Ready]] = {}
    for one in ready:
        if one.image is not None:
            about.setdefault(one.image, []).append(one)
    images = sorted(about, key=lambda image: -answerer.visual_length(visual[image]))
    while images:
        columns = len(answerer.head) + answerer.visual_length(visual[images[0]])
        count = max(1, answerer.batch_tokens // 2 // columns)
        yield [one for image in images[:count] for one in about[image]]
        images = images[count:]
    for shares_head in (True, False):
        text = [one for one in ready if one.image is None and one.shares_head is shares_head]
        if text:
            yield text


def _answer_hand(
    together: Sequence[Ready],
    visual: dict[Path | Embedded, "Tensor | Pixels"],
    answerer: Answerer,
    use: _Use,
    done: Callable[[Sequence[Ready], Sequence[str]], None],
) -> None:
    """Answers questions about images that are seen together, or about none."""
    images = list(dict.fromkeys(one.image for one in together if one.image is not None))
    if images:
        columns = len(answerer.head) + answerer.visual_length(visual[images[0]])
        use.tokens, use.is_least = len(images) * columns, len(images) == 1
        beginnings = answerer.see([visual[image] for image in images])
        row_of = {image: row for row, image in enumerate(images)}
        rows = [row_of[one.image] for one in together]
    else:
        beginnings = answerer.start if together[0].shares_head else prefix.nothing(answerer.model)
        rows = [0] * len(together)
    ids = answerer.cut([one.ids for one in together], beginnings, rows)
    held, columns = beginnings.rows * beginnings.length, beginnings.length
    generation = answerer.generation

    def tokens(count: int, longest: int) -> int:
        """In use while so many questions are answered."""
        return held + count * generation.num_beams * (columns + longest + generation.max_new_tokens)

    def fit(longest: int) -> int:
        return (answerer.batch_tokens - held) // (tokens(1, longest) - held)

    order = sorted(range(len(ids)), key=lambda place: (-len(ids[place]), place))
    for part in batches([len(ids[place]) for place in order], fit):
        places = order[part]
        use.tokens = tokens(len(places), len(ids[places[0]]))
        use.is_least = len(places) == 1 and len(images) < 2
        texts = answerer.answer_after(
            beginnings, [ids[place] for place in places], [rows[place] for place in places]
        )
        done([together[place] for place in places], texts)


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
