"""What an engine is asked, what it answers, and what every engine does. Importing this needs no torch."""

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llava.pixels import Source

ImageSource: TypeAlias = Union["Source", "Tensor"]
"""What `llava.pixels` decodes, or what `LocalEngine.encode` made of it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question.

    Attributes:
        id: comes back with the answer.
        text: what the user says, if that is all there is.
        messages: instead of `text`, a conversation: {"role": "user" | "assistant", "content": text} in turn,
            the user's first and last.
        images: for the `<image>` in the user's turns, in their order. Where no turn has one, they are put in
            front of the first turn, a line each.
        max_new_tokens: bound of the answer; less where the model's context ends before.
        temperature, top_p: of sampling; temperature 0 is greedy.
        seed: of sampling; None: another answer each time.
        reducer: spec of the token reducer for its images; None: the model's.
    """

    id: Any = 0
    text: str = ""
    messages: Sequence[dict[str, str]] = ()
    images: Sequence[ImageSource] = ()
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    seed: int | None = None
    reducer: str | None = None

    @property
    def question(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"] if self.messages else self.text


def texts_of(request: Request) -> list[str]:
    """What each turn of a request says, `<image>` where an image goes.

    Raises:
        UserError: turns out of order, another number of `<image>` than of images.
    """
    messages = request.messages or ({"role": "user", "content": request.text},)
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(
            f"a conversation takes turns of user and assistant, the user's last; here are {roles}."
        )
    texts = [message["content"] for message in messages]
    if not any(DEFAULT_IMAGE_TOKEN in text for text in texts[::2]):
        texts[0] = f"{DEFAULT_IMAGE_TOKEN}\n" * len(request.images) + texts[0]
    places, count = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts), len(request.images)
    if places != count:
        there = "is 1 picture" if count == 1 else f"are {count or 'no'} pictures"
        raise UserError(
            f"the question has {places} {DEFAULT_IMAGE_TOKEN} but there {there}: write one for each, "
            "where it belongs, or leave them out."
        )
    return texts


@dataclass(frozen=True)
class Timing:
    """What one streamed answer took.

    Attributes:
        vision_ms: pixels, tower, reducer and projector; 0 for images that were already encoded.
        prefill_ms: the language model up to the first new token.
        total_ms: vision_ms and everything up to the last token.
        new_tokens: length of the answer, its end included.
    """

    vision_ms: float
    prefill_ms: float
    total_ms: float
    new_tokens: int


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        visual_tokens: tokens handed to the language model, one number per image.
        problem: one sentence where the request could not be answered; `text` is empty then.
        timing: of `stream` only: what is computed together has no time of its own.
    """

    id: Any
    text: str = ""
    visual_tokens: tuple[int, ...] = ()
    problem: str | None = None
    timing: Timing | None = None


DEFAULT_REQUEST = Request()
"""No text, no images, the model's own reducer."""


class Engine(Protocol):
    """Whatever answers requests."""

    def answer(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer per request, in any order. What is wrong with one is its answer's `problem`."""
        ...

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """The pieces of one answer as they come; returns the whole. A problem gives no piece at all."""
        ...


def finish(pieces: Generator[str, None, Answer], emit: Callable[[str], None] = lambda piece: None) -> Answer:
    """Passes every piece of a stream to `emit`; returns the whole answer."""
    with closing(pieces):  # where `emit` raises, as Ctrl-C does, the model stops too
        while True:
            try:
                emit(next(pieces))
            except StopIteration as end:
                return end.value


def key_of(image: ImageSource) -> Hashable:
    """Equal for images that are encoded once: the same file, or the same object."""
    return str(image) if isinstance(image, Path | str) else id(image)
