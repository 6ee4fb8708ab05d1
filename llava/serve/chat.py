"""`llava chat`: ask any checkpoint, or a server (`--endpoint`), about pictures, in the terminal.

With --query one answer goes to stdout; without it the conversation goes on until an empty line. What an
answer took is told on stderr. Within a conversation:

    /image a.jpg,b.jpg    look at other pictures
    /reducer SPEC         change how many tokens they get
    /reset                forget the turns, keep the pictures

The first two begin a new conversation, because LLaVA's have their pictures in the first turn.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from torch import Tensor

    from llava.engine import Answer
    from llava.pixels import Source

COMMANDS = "/image FILES, /reducer SPEC, /reset; an empty line ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model-path", help="checkpoint: directory or hub name")
    which.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server: http://host:8000/v1")
    parser.add_argument("--model", metavar="NAME", help="as the server calls it (default: its only one)")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument("--image-file", default="", metavar="FILES", help="pictures, separated by commas")
    parser.add_argument("--video-file", metavar="FILE", help="a video, of which some frames are the pictures")
    parser.add_argument(
        "--frames", type=int, default=8, help="how many, spread evenly (default: %(default)s)"
    )
    parser.add_argument("--query", help="one question; without it the chat is interactive")
    parser.add_argument(
        "--reducer",
        metavar="SPEC",
        help='token reducer in place of the checkpoint\'s: prumerge+, "prumerge(ratio=0.125)", ...',
    )
    parser.add_argument("--vision-tower", metavar="DIR", help="vision tower in place of the checkpoint's")
    parser.add_argument(
        "--anyres",
        choices=("tile", "shared", "papers"),
        help="what a number of tokens means for pictures in tiles",
    )
    parser.add_argument("--conv-mode", help="prompt template (default: the one the model was trained with)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-p", "--top_p", type=float)
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=int, default=512, help="default: %(default)s"
    )
    parser.add_argument("--device", default="cuda", help="default: the best there is")
    parser.add_argument("--dtype", help="float16, bfloat16, float32 (default: what the device is best at)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--exif", action="store_true", help="turn pictures as their EXIF data says")


def run(args: argparse.Namespace) -> int:
    sampling = sampling_of(args)
    images = load_images(args.image_file, exif=args.exif)  # before the model: a bad picture fails at once
    if args.video_file is not None:
        if args.frames < 1:
            raise UserError(f"--frames {args.frames}: give 1 or more.")
        from llava.video import read_frames

        images += read_frames(args.video_file, args.frames)
    from llava.engine import EndpointEngine
    from llava.engine.source import source_of

    source = source_of(args)
    if isinstance(source, EndpointEngine):
        chat = Chat(source, sampling, args.reducer)
    else:
        chat = Chat(source.load(), sampling)
    chat.look_at(images)
    if args.query is not None:
        report(chat.ask(args.query, say))
        return 0
    return converse(chat, exif=args.exif)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """How answers are made, as fields of a Request.

    Raises:
        UserError: a number out of its range.
    """
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: give 1 or more.")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: give 0 (greedy) or more.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: give more than 0 and at most 1.")
    return {name: getattr(args, name) for name in ("temperature", "top_p", "max_new_tokens")}


def load_images(files: str, *, exif: bool) -> list["Source"]:
    """The pictures of a list separated by commas; as files, whose bytes a server gets, unless turned.

    Raises:
        UserError: one that cannot be read.
    """
    from llava.mm_utils import load_image

    paths = [Path(name.strip()) for name in files.split(",") if name.strip()]
    images = [load_image(path, exif=exif) for path in paths]
    return list(images if exif else paths)


@dataclass
class Chat:
    """A conversation about some pictures.

    A model of this process encodes them once, when they come in, unless its reducer reads each question. A
    server gets them with every turn. A turn that fails leaves everything as it was before.
    """

    engine: Any  # llava.engine.Engine; of a LocalEngine also what is its own
    sampling: dict[str, Any]
    reducer: str | None = None  # a server's; None: its default. A model of this process has its own.
    images: list["Source"] = field(default_factory=list)
    encoded: list["Tensor"] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    vision_ms: float = 0.0  # of pictures no answer has been given about yet

    @property
    def model(self) -> Any:
        """The model in this process; None where a server has it."""
        from llava.engine import LocalEngine

        return self.engine.model if isinstance(self.engine, LocalEngine) else None

    def look_at(self, images: list["Source"]) -> None:
        """Take pictures (or none) in place of those there were; a new conversation begins."""
        start = time.perf_counter()
        once = self.model is not None and not self.model.reducer.reads_question
        encoded = self.engine.encode(images) if once else []
        self.images, self.encoded, self.messages = images, encoded, []
        self.vision_ms = 1000 * (time.perf_counter() - start) if encoded else 0.0

    def use_reducer(self, spec: str) -> None:
        """Reduce visual tokens as `spec` says, those of the present pictures too; a new conversation begins.

        Raises:
            UserError: no such reducer, or one that does not work with this tower; the one before stays.
        """
        model = self.model
        if model is None:
            self.reducer = spec
            return self.look_at(self.images)
        before = model.reducer.spec
        model.set_reducer(spec)
        try:
            self.look_at(self.images)
        except UserError:
            model.set_reducer(before)
            raise

    def ask(self, text: str, emit: Callable[[str], None]) -> "Answer":
        """Answer one turn, its pieces to `emit`, and add both sides to the conversation.

        Raises:
            UserError: what `Answer.problem` says.
        """
        from llava.engine import Request, finish

        if not self.messages and DEFAULT_IMAGE_TOKEN not in text:
            text = f"{DEFAULT_IMAGE_TOKEN}\n" * len(self.images) + text
        messages = [*self.messages, {"role": "user", "content": text}]
        images = self.encoded or self.images
        request = Request(messages=messages, images=images, reducer=self.reducer, **self.sampling)
        answer = finish(self.engine.stream(request), emit)
        if answer.problem:
            raise UserError(answer.problem)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        timing, before = answer.timing, self.vision_ms
        self.vision_ms = 0.0
        timing = replace(timing, vision_ms=before + timing.vision_ms, total_ms=before + timing.total_ms)
        return replace(answer, timing=timing)


def converse(chat: Chat, *, exif: bool) -> int:
    """Turns until an empty line or the end of input. Prompts are shown to a terminal only, so that in a pipe
    stdout holds nothing but answers."""
    user, assistant = ("user: ", "assistant: ") if sys.stdin.isatty() else ("", "")
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (arrow keys and history for input)
    if user:
        note(COMMANDS)
    while True:
        try:
            line = input(user).strip()
        except EOFError:
            return 0
        if not line:
            return 0
        try:
            if line.startswith("/"):
                note(obey(chat, line, exif=exif))
            else:
                print(assistant, end="", flush=True)
                report(chat.ask(line, say))
        except UserError as error:  # a slip must not end the conversation
            note(str(error))
        except KeyboardInterrupt:
            print()
            note("stopped; that turn is forgotten")


def obey(chat: Chat, line: str, *, exif: bool) -> str:
    """Do what a line that begins with a slash says; what to tell the user about it."""
    command, _, argument = line.partition(" ")
    match command:
        case "/image":
            chat.look_at(load_images(argument, exif=exif))
        case "/reducer":
            chat.use_reducer(argument.strip())
        case "/reset":
            chat.messages = []
        case _:
            raise UserError(f"there is no command {command}: {COMMANDS}")
    seen = as_tokens(map(len, chat.encoded)) or f"pictures: {len(chat.images)}"
    spec = chat.model.reducer.spec if chat.model is not None else chat.reducer or "of the server"
    return f"new conversation: {seen}, reducer {spec}"


def say(piece: str) -> None:
    print(piece, end="", flush=True)


def note(text: str) -> None:
    print(f"({text})", file=sys.stderr)


def report(answer: "Answer") -> None:
    """End the answer's line; what it took."""
    print(flush=True)
    took = answer.timing
    seen = f"{tokens}; " if (tokens := as_tokens(answer.visual_tokens)) else ""
    vision = f"vision {took.vision_ms:.0f} ms, " if took.vision_ms else ""  # of a server: part of the prefill
    total = f"total {took.total_ms:.0f} ms for {took.new_tokens} new tokens"
    note(f"{seen}{vision}prefill {took.prefill_ms:.0f} ms, {total}")


def as_tokens(counts: Iterable[int]) -> str:
    """ "" where there are none, or none are known."""
    numbers = " + ".join(map(str, counts))
    return f"{numbers} visual tokens" if numbers else ""
