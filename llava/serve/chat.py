"""`llava chat`: ask any checkpoint about pictures, in the terminal.

With --query one answer goes to stdout and what it took to stderr; without it the conversation goes on until an
empty line. Within it, `/image a.jpg,b.jpg` looks at other pictures, `/reducer SPEC` changes how many tokens
they get, `/reset` forgets the turns.
"""

import argparse
import sys
from pathlib import Path

from llava.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="checkpoint directory or hub name")
    parser.add_argument("--model-base", default=None, help="the base of a LoRA or projector-only checkpoint")
    parser.add_argument("--image-file", default="", help="pictures, separated by commas (default: none)")
    parser.add_argument("--query", default=None, help="one question; without it the chat is interactive")
    parser.add_argument("--reducer", default=None, metavar="SPEC", help='e.g. prumerge+ or "prumerge(ratio=0.125)"')
    parser.add_argument("--conv-mode", default=None, help="conversation template (default: by the checkpoint)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 answers greedily (default)")
    parser.add_argument("--top-p", "--top_p", type=float, default=None)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument("--vision-tower", default=None, help="directory of the tower, if not where the config says")
    parser.add_argument("--device", default=None, help="cuda, cpu, ... (default: what is there)")
    parser.add_argument("--dtype", default=None, choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--exif", action="store_true", help="turn pictures as their EXIF data says (training did not)")


def run(args: argparse.Namespace) -> int:
    from llava.conversation import conv_mode_for
    from llava.mm_utils import get_model_name_from_path, load_image
    from llava.model.builder import load_pretrained_model
    from llava.serve.session import ChatSession

    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: give 1 or more.")
    files = [name.strip() for name in args.image_file.split(",") if name.strip()]
    images = [load_image(name, exif=args.exif) for name in files]  # before the model: a bad picture fails at once
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=args.device,
        dtype=args.dtype,
        reducer=args.reducer,
        vision_tower=args.vision_tower,
    )
    session = ChatSession(model, tokenizer, image_processor, args.conv_mode or conv_mode_for(name, model.config))
    if images:
        session.look_at(images)
    settings = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    if args.query is not None:
        report(session.ask(args.query, stream=True, **settings))
        return 0
    return converse(session, settings, exif=args.exif)


def converse(session, settings: dict, exif: bool) -> int:
    """Turns until an empty line or the end of input."""
    from llava.mm_utils import load_image

    user, assistant = (role.strip() or name for role, name in zip(session.conversation.roles, ("USER", "ASSISTANT")))
    images = []
    while True:
        try:
            line = input(f"{plain(user)}: ").strip()
        except EOFError:
            line = ""
        if not line:
            print("bye", file=sys.stderr)
            return 0
        try:
            if line.startswith("/image "):
                images = [load_image(Path(n.strip()), exif=exif) for n in line.removeprefix("/image ").split(",")]
                session.look_at(images)
            elif line.startswith("/reducer "):
                session.model.set_reducer(line.removeprefix("/reducer ").strip())
                if images:
                    session.look_at(images)
                else:
                    print("(holds from the next /image on)", file=sys.stderr)
            elif line == "/reset":
                session.reset()
            elif line.startswith("/"):
                print("(commands: /image FILES, /reducer SPEC, /reset; an empty line ends)", file=sys.stderr)
            else:
                print(f"{plain(assistant)}: ", end="", flush=True)
                report(session.ask(line, stream=True, **settings))
        except (UserError, ValueError) as error:  # a typing error must not end the conversation
            print(f"({error})", file=sys.stderr)


def plain(role: str) -> str:
    """ChatML roles carry their tags: `<|im_start|>user` -> `user`."""
    return role.rsplit("|>", 1)[-1].strip()


def report(reply) -> None:
    tokens = " + ".join(map(str, reply.visual_tokens)) or "no"
    print(
        f"({tokens} visual tokens; vision {reply.vision_ms:.0f} ms, prefill {reply.prefill_ms:.0f} ms, "
        f"total {reply.total_ms:.0f} ms for {reply.new_tokens} new tokens)",
        file=sys.stderr,
    )
