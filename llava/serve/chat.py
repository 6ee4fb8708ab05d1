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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from PIL import Image

    from llava.serve.session import ChatSession, Reply

COMMANDS = "/image FILES, /reducer SPEC, /reset; an empty line ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="checkpoint: directory or hub name")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument("--image-file", default="", metavar="FILES", help="pictures, separated by commas")
    parser.add_argument("--query", help="one question; without it the chat is interactive")
    parser.add_argument(
        "--reducer",
        metavar="SPEC",
        help='token reducer in place of the checkpoint\'s: prumerge+, "prumerge(ratio=0.125)", ...',
    )
    parser.add_argument("--vision-tower", metavar="DIR", help="vision tower in place of the checkpoint's")
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
    parser.add_argument("--packed", action="store_true", help="on a CPU: faster, for twice the memory")
    parser.add_argument("--exif", action="store_true", help="turn pictures as their EXIF data says")


def run(args: argparse.Namespace) -> int:
    sampling = sampling_of(args)
    images = load_images(args.image_file, exif=args.exif)  # before the model: a bad picture fails at once
    session = open_session(args)
    session.look_at(images)
    if args.query is not None:
        report(session.ask(args.query, emit=say, **sampling))
        return 0
    return converse(session, sampling, exif=args.exif)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """How answers are made, for `ChatSession.ask`.

    Raises:
        UserError: a number out of its range.
    """
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: give 1 or more.")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: give 0 (greedy) or more.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: give more than 0 and at most 1.")
    return {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }


def load_images(files: str, *, exif: bool) -> list["Image.Image"]:
    """The pictures of a list separated by commas."""
    from llava.mm_utils import load_image

    return [load_image(Path(name.strip()), exif=exif) for name in files.split(",") if name.strip()]


def open_session(args: argparse.Namespace) -> "ChatSession":
    """The checkpoint that the flags name, ready to be asked."""
    from llava.conversation import default_conv_mode
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.serve.session import ChatSession

    name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=args.device,
        reducer=args.reducer,
        vision_tower=args.vision_tower,
        dtype=args.dtype,
        packed=args.packed,
    )
    conv_mode = args.conv_mode or default_conv_mode(name, tokenizer)
    return ChatSession(model, tokenizer, image_processor, conv_mode)


def converse(session: "ChatSession", sampling: dict[str, Any], *, exif: bool) -> int:
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
                note(obey(session, line, exif=exif))
            else:
                print(assistant, end="", flush=True)
                report(session.ask(line, emit=say, **sampling))
        except UserError as error:  # a slip must not end the conversation
            note(str(error))
        except KeyboardInterrupt:
            print()
            note("stopped; that turn is forgotten")


def obey(session: "ChatSession", line: str, *, exif: bool) -> str:
    """Do what a line that begins with a slash says; what to tell the user about it."""
    command, _, argument = line.partition(" ")
    match command:
        case "/image":
            session.look_at(load_images(argument, exif=exif))
        case "/reducer":
            session.use_reducer(argument.strip())
        case "/reset":
            session.reset()
        case _:
            raise UserError(f"there is no command {command}: {COMMANDS}")
    return f"new conversation: {as_tokens(session.visual_tokens)}, reducer {session.model.reducer.spec}"


def say(piece: str) -> None:
    print(piece, end="", flush=True)


def note(text: str) -> None:
    print(f"({text})", file=sys.stderr)


def report(reply: "Reply") -> None:
    """End the answer's line; what it took."""
    print(flush=True)
    note(
        f"{as_tokens(reply.visual_tokens)}; vision {reply.vision_ms:.0f} ms, "
        f"prefill {reply.prefill_ms:.0f} ms, total {reply.total_ms:.0f} ms for {reply.new_tokens} new tokens"
    )


def as_tokens(counts: tuple[int, ...]) -> str:
    return f"{' + '.join(map(str, counts))} visual tokens" if counts else "no picture"
