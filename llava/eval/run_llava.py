"""`python -m llava.eval.run_llava`, and `eval_model(args)`: one question about one or more pictures.

Programs call `eval_model` with an object that has model_path, model_base, query, image_file and, if they
like, conv_mode, sep, temperature, top_p, num_beams, max_new_tokens, reducer.
"""

import argparse
import sys
import urllib.request
from pathlib import Path

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import conv_mode_for
from llava.errors import UserError
from llava.eval.predict import Answerer, Generation, Pixels
from llava.eval.runner import complete, main
from llava.mm_utils import get_model_name_from_path, load_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

TIMEOUT_SECONDS = 30


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model-path", default="facebook/opt-350m")
    flags.add_argument("--model-base")
    flags.add_argument("--image-file", required=True, help="path or URL; several are joined by --sep")
    flags.add_argument("--query", required=True)
    flags.add_argument("--conv-mode")
    flags.add_argument("--sep", default=",")
    flags.add_argument("--temperature", type=float, default=0.2)
    flags.add_argument("--top_p", type=float)
    flags.add_argument("--num_beams", type=int, default=1)
    flags.add_argument("--max_new_tokens", type=int, default=512)
    flags.add_argument("--reducer", help="token reducer in place of the checkpoint's, e.g. prumerge+")
    return flags


def open_image(source: str) -> Image.Image:
    """A path, or a URL, which is fetched because the user named it."""
    if not source.startswith(("http://", "https://")):
        return load_image(Path(source))
    try:
        with urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS) as response:
            return load_image(response.read(), name=source)
    except OSError as error:
        raise UserError(f"{source} cannot be fetched ({error}).") from error


def eval_model(args: argparse.Namespace) -> int:
    """Prints the answer."""
    args = complete(parser(), args)
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, args.model_base, name, reducer=args.reducer
    )
    generation = Generation(args.max_new_tokens, args.temperature, args.top_p, args.num_beams)
    answerer = Answerer(model, tokenizer, image_processor, args.conv_mode or conv_mode_for(name), generation)
    pictures = [open_image(source) for source in args.image_file.split(args.sep)]
    values = process_images(pictures, image_processor, answerer.recipe)
    pixels = [Pixels(one.numpy(), picture.size) for one, picture in zip(values, pictures, strict=True)]
    if IMAGE_PLACEHOLDER in args.query:
        # The caller says where the pictures go; `prompt` adds no tag of its own then.
        prompt = answerer.prompt(args.query.replace(IMAGE_PLACEHOLDER, answerer.tag), with_image=False)
    else:
        prompt = answerer.prompt(
            "\n".join([answerer.tag] * len(pixels)) + f"\n{args.query}", with_image=False
        )
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    places = prompt.count(DEFAULT_IMAGE_TOKEN)
    if places != len(pixels):
        raise UserError(f"the question has {places} places for pictures, and there are {len(pixels)}.")
    visual = pixels if answerer.joins_tiles else answerer.encode(pixels)
    print(answerer.answer([ids], visual)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(parser(), eval_model))
