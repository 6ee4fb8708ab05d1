"""`llava chat`: ask any checkpoint about pictures, in the terminal.

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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from PIL import Image
    from torch import Tensor

    from llava.engine import Answer, LocalEngine

COMMANDS = "/image FILES, /reducer SPEC, /reset; an empty line ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="checkpoint: directory or hub name")
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
    from llava.engine import ModelSource

    chat = Chat(ModelSource.of(args).load(), sampling)
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


def load_images(files: str, *, exif: bool) -> list["Image.Image"]:
    """The pictures of a list separated by commas."""
    from llava.mm_utils import load_image

    return [load_image(Path(name.strip()), exif=exif) for name in files.split(",") if name.strip()]


@dataclass
class Chat:
    """A conversation about some pictures, which are encoded once, when they come in.

    A turn that fails leaves everything as it was before.
    """

    engine: "LocalEngine"
    sampling: dict[str, Any]
    images: list["Image.Image"] = field(default_factory=list)
    encoded: list["Tensor"] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    vision_ms: float = 0.0  # of pictures no answer has been given about yet

    def look_at(self, images: list["Image.Image"]) -> None:
        """Encode pictures (or none) in place of those there were; a new conversation begins."""
        start = time.perf_counter()
        encoded = self.engine.encode(images)
        self.images, self.encoded, self.messages = images, encoded, []
        self.vision_ms = 1000 * (time.perf_counter() - start)

    def use_reducer(self, spec: str) -> None:
        """Reduce visual tokens as `spec` says, those of the present pictures too; a new conversation begins.

        Raises:
            UserError: no such reducer, or one that does not work with this tower; the one before stays.
        """
        model = self.engine.model
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
        request = Request(messages=messages, images=self.encoded, **self.sampling)
        answer = finish(self.engine.stream(request), emit)
        if answer.problem:
            raise UserError(answer.problem)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        vision_ms, self.vision_ms = self.vision_ms, 0.0
        timing = replace(answer.timing, vision_ms=vision_ms, total_ms=vision_ms + answer.timing.total_ms)
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
    counts = tuple(map(len, chat.encoded))
    return f"new conversation: {as_tokens(counts)}, reducer {chat.engine.model.reducer.spec}"


def say(piece: str) -> None:
    print(piece, end="", flush=True)


def note(text: str) -> None:
    print(f"({text})", file=sys.stderr)


def report(answer: "Answer") -> None:
    """End the answer's line; what it took."""
    print(flush=True)
    took = answer.timing
    note(
        f"{as_tokens(answer.visual_tokens)}; vision {took.vision_ms:.0f} ms, "
        f"prefill {took.prefill_ms:.0f} ms, total {took.total_ms:.0f} ms for {took.new_tokens} new tokens"
    )


def as_tokens(counts: tuple[int, ...]) -> str:
    return f"{' + '.join(map(str, counts))} visual tokens" if counts else "no picture"
