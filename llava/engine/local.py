"""The engine that runs a model in this process. The package's head tells how it goes about it."""

import threading
import time
import zlib
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.engine.batching import batches, chunked, free_memory, is_out_of_memory
from llava.engine.requests import DEFAULT_REQUEST, Answer, ImageSource, Request, Timing, key_of, texts_of
from llava.engine.streaming import TextStream
from llava.errors import UserError
from llava.mm_utils import image_tag, tokenizer_image_token
from llava.model import prefix
from llava.model.question import QuestionReader
from llava.pixels import Decoding, Pixels, Source, decode, in_workers
from llava.reducers import ReducedTokens, Reducer, VisionFeatures

CPU_BATCH_TOKENS = 8192
IMAGES_AT_ONCE = 32


def check_template(conv_mode: str) -> None:
    if conv_mode not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise UserError(f"there is no conversation template {conv_mode!r}; --conv-mode takes {known}.")


@dataclass(frozen=True)
class Look:
    """What a model saw in one image, and what its reducer kept.

    Attributes:
        pixels: [T, 3, S, S] normalised pixels of its T views: the image itself, or with anyres its small copy
            and its tiles.
        size: (width, height) of the image.
        features: of the T views.
        reduced: of each view, B = 1.
    """

    pixels: Tensor
    size: tuple[int, int]
    features: VisionFeatures
    reduced: list[ReducedTokens]


class _Key(NamedTuple):
    """Equal for what is encoded once."""

    image: Hashable
    reducer: Reducer
    question: str | None
    """None: the reducer does not read it."""


@dataclass(frozen=True)
class _Prompt:
    """A request ready for the language model.

    Attributes:
        ids: with IMAGE_TOKEN_INDEX where an image goes.
        keys: what tells its images from others.
        visual: [K_i, hidden] of each image.
        arguments: of `generate`, (name, value) pairs; only prompts with the same ones share a batch.
    """

    request: Request
    ids: list[int]
    keys: tuple["_Key", ...]
    visual: tuple[Tensor, ...]
    arguments: tuple[tuple[str, Any], ...]

    @property
    def opening(self) -> list[int]:
        """The ids up to and with the last image; none without an image."""
        places = [place for place, one in enumerate(self.ids) if one == IMAGE_TOKEN_INDEX]
        return self.ids[: places[-1] + 1] if places else []

    @property
    def question(self) -> list[int]:
        """The ids after the opening."""
        return self.ids[len(self.opening) :]

    @property
    def columns(self) -> int:
        """Tokens of the opening."""
        return len(self.opening) - len(self.visual) + sum(map(len, self.visual))

    def answer(self, text: str = "", problem: str | None = None) -> Answer:
        return Answer(self.request.id, text, tuple(map(len, self.visual)), problem)


class LocalEngine:
    """A model in this process.

    Args:
        conv_mode: the prompt template.
        image_aspect_ratio: replaces the checkpoint's own.
        batch_tokens: bound of the keys and values alive at a time, in tokens with padding: half for openings,
            the rest for questions and answers. Halved, for the engine's life, whenever memory runs out.
        decode_workers: processes that decode images ahead; 0: this one does.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        conv_mode: str,
        *,
        image_aspect_ratio: str | None = None,
        batch_tokens: int | None = None,
        decode_workers: int = 0,
    ):
        check_template(conv_mode)
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.conv_mode = conv_mode
        self.read_question = QuestionReader(model, tokenizer)
        config = model.config
        self.pixel_config = SimpleNamespace(
            image_aspect_ratio=image_aspect_ratio or config.image_aspect_ratio,
            image_grid_pinpoints=config.image_grid_pinpoints,
            mm_anyres_budget=config.mm_anyres_budget,
        )
        self.batch_tokens = batch_tokens or self._free_tokens()
        self.images_at_once = IMAGES_AT_ONCE
        self.decode_workers = decode_workers

    @property
    def stop(self) -> str | None:
        """What ends an answer in this template, where the tokenizer's own end of sequence does not."""
        stop = conv_templates[self.conv_mode].stop_string
        return None if stop == self.tokenizer.eos_token else stop

    def _free_tokens(self) -> int:
        """Tokens whose keys and values fill half of the free memory; the rest is for everything else."""
        if self.model.device.type != "cuda":
            return CPU_BATCH_TOKENS
        config = self.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * head
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return max(CPU_BATCH_TOKENS, free // 2 // (values * self.model.dtype.itemsize))

    # --- many requests ---

    def answer(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """See `Engine`."""
        chunks = list(chunked(requests))
        wanted = [
            {key_of(image): image for one in chunk for image in one.images if not isinstance(image, Tensor)}
            for chunk in chunks
        ]
        decoding = Decoding(
            [image for images in wanted for image in images.values()], self.image_processor, self.pixel_config
        )
        # A worker process takes a second to start.
        decoded = iter(in_workers(decoding, self.decode_workers if len(decoding) > 8 else 0))
        for chunk, images in zip(chunks, wanted, strict=True):
            yield from self._answer_chunk(chunk, {key: next(decoded) for key in images})

    def _answer_chunk(
        self, requests: Sequence[Request], decoded: dict[Hashable, Pixels | str]
    ) -> Iterator[Answer]:
        asked: list[tuple[Request, list[_Key]]] = []
        visual: dict[_Key, Tensor | str] = {}
        wanted: dict[_Key, Pixels] = {}
        for request in requests:
            try:
                keys = [self._key(image, request) for image in request.images]
            except UserError as error:  # no such reducer
                yield Answer(request.id, problem=str(error))
                continue
            asked.append((request, keys))
            for key in keys:
                pixels = decoded.get(key.image)  # none for what is encoded already
                if isinstance(pixels, str):
                    visual[key] = pixels
                elif pixels is not None:
                    wanted[key] = pixels
        visual |= zip(wanted, self._embed(list(wanted.items())), strict=True)
        prompts = []
        for request, keys in asked:
            try:
                prompts.append(self._prompt(request, keys, visual))
            except UserError as error:
                yield Answer(request.id, problem=str(error))
        if prompts:
            yield from self._answer_prompts(prompts)

    def _answer_prompts(self, prompts: Sequence[_Prompt]) -> Iterator[Answer]:
        # The ids all prompts begin with: the system prompt. At least one id is left for generation to read.
        columns = zip(*(prompt.opening or prompt.ids[:-1] for prompt in prompts), strict=False)
        alike = takewhile(lambda ids: len(set(ids)) == 1 and ids[0] != IMAGE_TOKEN_INDEX, columns)
        shared = [ids[0] for ids in alike]
        waiting = {number: replace(p, ids=p.ids[len(shared) :]) for number, p in enumerate(prompts)}
        while waiting:
            # What cannot be answered if memory runs out now, and whether no smaller step is possible.
            tried, smallest = list(waiting), True
            seen = start = None
            try:
                start = prefix.begin(self.model, torch.tensor(shared, dtype=torch.long))
                for openings in self._openings(waiting, start):
                    tried, smallest = openings[0], len(openings) == 1
                    # A row per opening, or all go on from `start`: then none of them has an image.
                    blocks = [
                        self._splice(waiting[group[0]]) for group in openings if waiting[group[0]].visual
                    ]
                    seen = prefix.extend(self.model, start, blocks, [0] * len(blocks)) if blocks else start
                    for batch in self._batches(waiting, openings, seen):
                        tried, smallest = [number for number, _ in batch], len(openings) == len(batch) == 1
                        texts = self._generate([(waiting[number], row) for number, row in batch], seen)
                        for number, text in zip(tried, texts, strict=True):
                            yield waiting.pop(number).answer(text)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            seen = start = None  # here the error, and what its frames held, is gone
            free_memory()
            if not smallest:
                self.batch_tokens = max(1, self.batch_tokens // 2)
                continue
            for number in tried:
                yield waiting.pop(number).answer(problem="its prompt does not fit in memory")

    def _openings(self, waiting: dict[int, _Prompt], start: prefix.Prefix) -> Iterator[list[list[int]]]:
        """Prompts, by number, grouped by their opening; as many openings together as fit half of the budget.

        The longest come first, so that memory runs out early if it does. Prompts without images have no
        opening of their own and come last.
        """
        groups: dict[Hashable, list[int]] = {}
        for number, prompt in waiting.items():
            groups.setdefault((prompt.keys, *prompt.opening), []).append(number)
        text_only = [group for group in groups.values() if not waiting[group[0]].visual]
        about_images = [group for group in groups.values() if waiting[group[0]].visual]
        about_images.sort(key=lambda group: -waiting[group[0]].columns)

        def fits(count: int, longest: int) -> bool:
            return count * (start.length + longest) <= self.batch_tokens // 2

        for part in batches([waiting[group[0]].columns for group in about_images], fits):
            yield about_images[part]
        if text_only:
            yield text_only

    def _batches(
        self, waiting: dict[int, _Prompt], openings: Sequence[Sequence[int]], seen: prefix.Prefix
    ) -> Iterator[list[tuple[int, int]]]:
        """Prompts, by number, each with the row of `seen` it goes on from, in groups answered together."""
        by_arguments: dict[tuple[tuple[str, Any], ...], list[tuple[int, int]]] = {}
        for row, opening in enumerate(openings):
            for number in opening:
                by_arguments.setdefault(waiting[number].arguments, []).append((number, row))
        for arguments, rows in by_arguments.items():
            rows.sort(key=lambda one: -len(waiting[one[0]].question))
            beams, new = (dict(arguments)[name] for name in ("num_beams", "max_new_tokens"))

            def fits(count: int, longest: int, beams: int = beams, new: int = new) -> bool:
                each = beams * (seen.length + longest + new)
                return seen.rows * seen.length + count * each <= self.batch_tokens

            for part in batches([len(waiting[number].question) for number, _ in rows], fits):
                yield rows[part]

    # --- the model ---

    def _reducer(self, request: Request) -> Reducer:
        """Raises UserError: no such reducer, or one that this model cannot use."""
        return self.model.reducer if request.reducer is None else self.model.make_reducer(request.reducer)

    def _key(self, image: ImageSource, request: Request) -> _Key:
        reducer = self._reducer(request)
        return _Key(key_of(image), reducer, request.question if reducer.reads_question else None)

    @torch.inference_mode()
    def _embed(self, wanted: Sequence[tuple[_Key, Pixels]]) -> list[Tensor]:
        """[K_i, hidden] of each image as its key says: tower, reducer, projector, tiles joined."""
        blocks: list[Tensor] = []
        while len(blocks) < len(wanted):
            first = wanted[len(blocks)][1].values
            tiles = len(first) if first.ndim == 4 else 1
            part = wanted[len(blocks) : len(blocks) + max(1, self.images_at_once // tiles)]
            values = [torch.from_numpy(pixels.values) for _, pixels in part]
            reducers = [key.reducer for key, _ in part]
            texts = [self.read_question(key.question or "", key.reducer) for key, _ in part]
            try:
                # Plain images as one tensor; for anyres a list of [tiles, 3, S, S], whose tiles differ.
                images = torch.stack(values) if first.ndim == 3 else values
                sizes = [pixels.size for _, pixels in part]
                blocks += self.model.embed_images(images, sizes, reducers, texts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                self.images_at_once = max(1, self.images_at_once // 2)
                free_memory()
        return blocks

    @torch.inference_mode()
    def _splice(self, prompt: _Prompt) -> Tensor:
        """[columns, hidden]: the opening's embeddings, an image's in place of each IMAGE_TOKEN_INDEX."""
        ids = torch.tensor(prompt.opening)
        text = self.model.get_input_embeddings()(ids.clamp_min(0).to(self.model.device))
        # Each piece but the first begins with a placeholder.
        first, *pieces = text.tensor_split((ids == IMAGE_TOKEN_INDEX).nonzero().flatten())
        both = zip(prompt.visual, pieces, strict=True)
        return torch.cat([first, *(part for image, piece in both for part in (image.to(text), piece[1:]))])

    @torch.inference_mode()
    def _generate(self, batch: Sequence[tuple[_Prompt, int]], seen: prefix.Prefix) -> list[str]:
        first = batch[0][0]
        if first.request.temperature > 0 and first.request.seed is not None:
            ids = [prompt.request.id for prompt, _ in batch]
            torch.manual_seed(zlib.crc32(repr((first.request.seed, ids)).encode()))
        new = prefix.answer(
            self.model,
            seen,
            [torch.tensor(prompt.question) for prompt, _ in batch],
            [row for _, row in batch],
            **self._stops(),
            **dict(first.arguments),
        )
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip().removesuffix(self.stop or "").strip() for text in texts]

    def _stops(self) -> dict[str, Any]:
        stops = {"stop_strings": [self.stop], "tokenizer": self.tokenizer} if self.stop else {}
        return {**stops, "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}

    # --- prompts ---

    def prompt(self, request: Request) -> str:
        """The whole prompt of a request as the weights were trained on it, `<image>` where an image goes.

        Raises UserError as `texts_of`.
        """
        conversation = conv_templates[self.conv_mode].copy()
        for place, text in enumerate([*texts_of(request), None]):
            if text:
                text = text.replace(DEFAULT_IMAGE_TOKEN, image_tag(self.model.config.mm_use_im_start_end))
            conversation.append_message(conversation.roles[place % 2], text)
        return conversation.get_prompt()

    def _prompt(self, request: Request, keys: Sequence[_Key], visual: Mapping[_Key, Tensor | str]) -> _Prompt:
        """Raises UserError as `prompt`, for an image that cannot be read, for a prompt that is too long."""
        blocks = []
        for key, image in zip(keys, request.images, strict=True):
            block = image if isinstance(image, Tensor) else visual[key]
            if isinstance(block, str):
                raise UserError(block)
            blocks.append(block)
        ids = list(tokenizer_image_token(self.prompt(request), self.tokenizer))
        length = len(ids) - len(blocks) + sum(map(len, blocks))
        config = self.model.config
        context = config.max_position_embeddings
        longest = min(context - 1, config.tokenizer_model_max_length or context)
        if length > longest:
            raise UserError(
                f"the prompt is {length} tokens long and the model reads at most {longest}: make it shorter "
                "(/reset begins a new chat), or keep fewer visual tokens (a reducer such as prumerge+)."
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        arguments = {
            **sampling,
            "num_beams": request.num_beams,
            "max_new_tokens": min(request.max_new_tokens, context - length),
        }
        return _Prompt(request, ids, tuple(keys), tuple(blocks), tuple(arguments.items()))

    # --- one request ---

    def _decode(self, image: Source) -> Pixels:
        pixels = decode(image, self.image_processor, self.pixel_config)
        if isinstance(pixels, str):
            raise UserError(pixels)
        return pixels

    @torch.inference_mode()
    def look(self, image: Source, request: Request = DEFAULT_REQUEST) -> Look:
        """What the model sees in an image, and keeps of it for this request, whose own images do not matter.

        Raises:
            UserError: as `encode`.
        """
        pixels = self._decode(image)
        values = torch.from_numpy(pixels.values)
        views = values if values.ndim == 4 else values[None]
        reducer = self._reducer(request)
        features, reduced = self.model.reduce_images(
            views, [len(views)], [reducer], [self.read_question(request.question, reducer)]
        )
        return Look(views, pixels.size, features, reduced)

    def encode(self, images: Sequence[Source], request: Request = DEFAULT_REQUEST) -> list[Tensor]:
        """[K_i, hidden] of each image, to be given in place of it: a conversation encodes its images once.

        Args:
            request: whose reducer, and question if the reducer reads it, decide what is kept.

        Raises:
            UserError: an image that cannot be read, a reducer that this model cannot use.
        """
        blocks = self._embed([(self._key(image, request), self._decode(image)) for image in images])
        if self.model.device.type == "cuda":  # kernels run on after their call returns; a clock must not
            torch.cuda.synchronize(self.model.device)
        return blocks

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """See `Engine`.

        Where the generator is closed before its end the model stops at the next token.
        """
        start = time.perf_counter()
        try:
            images = [one for one in request.images if not isinstance(one, Tensor)]
            encoded_images = zip(images, self.encode(images, request), strict=True)
            visual = {self._key(image, request): block for image, block in encoded_images}
            prompt = self._prompt(request, [self._key(image, request) for image in request.images], visual)
        except UserError as error:
            return Answer(request.id, problem=str(error))
        encoded = time.perf_counter()
        pieces: SimpleQueue[str | None] = SimpleQueue()
        stream = TextStream(self.tokenizer, self.stop, pieces.put)
        closed = threading.Event()

        @torch.inference_mode()  # a thread's own
        def generate() -> Tensor:
            if request.temperature > 0 and request.seed is not None:
                torch.manual_seed(request.seed)
            return self.model.generate(
                torch.tensor([prompt.ids]),
                visual_embeds=list(prompt.visual),
                streamer=stream,
                stopping_criteria=[lambda ids, _, **__: ids.new_full(ids.shape[:1], closed.is_set()).bool()],
                **self._stops(),
                **dict(prompt.arguments),
            )

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(generate)
            running.add_done_callback(lambda _: pieces.put(None))
            try:
                yield from iter(pieces.get, None)
            finally:
                closed.set()
            new = running.result()
        vision = 1000 * (encoded - start) if images else 0.0
        end = time.perf_counter()
        timing = Timing(
            vision_ms=vision,
            prefill_ms=1000 * (stream.first - encoded),
            total_ms=vision + 1000 * (end - encoded),
            new_tokens=new.shape[1],
        )
        return Answer(request.id, stream.text, tuple(map(len, prompt.visual)), timing=timing)
