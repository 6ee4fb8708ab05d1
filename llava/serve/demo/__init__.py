"""`llava demo`: a web page that answers questions about a picture and shows which of its patches were kept.

Without flags it runs the small model on whatever device there is. Only this machine can open the page, unless
`--host` says otherwise. Nothing of a visitor is kept: pictures and conversations live in the memory of their
session, and an uploaded file is deleted within a minute.
"""

import argparse
import importlib.util
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none
    from llava.engine import Engine

MODEL, BASE = "checkpoints/mini-lora", "checkpoints/mini-base"
PICTURES = Path("playground/pictures")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", help=f"checkpoint: directory or hub name (default: {MODEL})")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server to ask instead")
    parser.add_argument("--model", metavar="NAME", help="with --endpoint: which of the server's models")
    parser.add_argument("--reducer", metavar="SPEC", help="the one to begin with (default: the checkpoint's)")
    parser.add_argument("--device", default="cuda", help="default: the best there is")
    parser.add_argument("--dtype", help="float16, bfloat16, float32 (default: what the device is best at)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines too (default: this one)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("llava demo needs Gradio: pip install 'llava[demo]'")
    if args.endpoint and (args.model_path or args.model_base):
        raise UserError("--endpoint is a server that has its model: leave out --model-path and --model-base.")
    if args.model_path is None:
        args.model_path, args.model_base = MODEL, args.model_base or BASE
        for folder in (MODEL, args.model_base):
            if not args.endpoint and not Path(folder).is_dir():
                raise UserError(
                    f"{folder} is missing: build it with `llava mini prepare`, or give --model-path."
                )
    with tempfile.TemporaryDirectory(prefix="llava-demo-") as uploads:
        # Gradio reads these when it is imported.
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False")
        from llava.serve.demo.page import Demo, serve

        if args.endpoint:
            from llava.engine import EndpointEngine

            name = args.model or args.endpoint
            engine: Engine = EndpointEngine(args.endpoint, args.model)
        else:
            from llava.engine import ModelSource

            source = ModelSource.of(args)
            engine, name = source.load(), source.name
        demo = Demo(engine, name, PICTURES, args.reducer)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes then, too
        serve(demo, args.host, args.port)
    return 0
