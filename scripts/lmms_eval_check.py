"""lmms-eval's own `llava` model class, unchanged, on this package: a few local questions on any machine.

    pip install --no-deps --target outputs/lmms-eval lmms-eval==0.7.3 loguru pytz evaluate
    python scripts/lmms_eval_check.py --lmms-eval outputs/lmms-eval --model-path checkpoints/mini-lora \\
        --conv-template smollm2

Prints each answer, in batches of one and of several, beside the one a plain generate call gives to the same
pixels (lmms-eval rounds them to float16). Exit status 1 if any of them differ. docs/harnesses.md says more.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.errors import UserError, exit_status
from llava.eval.benchmarks.base import SHORT
from llava.mm_utils import load_image, process_images, tokenizer_image_token

TASK, SPLIT = "local", "test"
GENERATION = {"max_new_tokens": 8, "temperature": 0}


@dataclass(frozen=True)
class Question:
    """One picture and what is asked about it."""

    name: str
    image: Image.Image
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--lmms-eval", type=Path, metavar="DIR", help="where it was installed with --target")
    flags.add_argument("--model-path", default="checkpoints/mini-lora", help="default: %(default)s")
    flags.add_argument("--conv-template", default="smollm2", help="default: %(default)s")
    flags.add_argument("--pictures", type=Path, default=Path("playground/pictures"))
    flags.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = flags.parse_args(argv)
    return exit_status(lambda: check(args), name="lmms_eval_check")


def check(args: argparse.Namespace) -> int:
    if args.lmms_eval is not None:
        sys.path.append(str(args.lmms_eval))  # at the end: it must not shadow what is installed
    questions = read_questions(args.pictures)
    harness = harness_of(args)
    singly, together = (answers_of(harness, questions, batch_size) for batch_size in (1, len(questions)))
    plain = [plain_answer(harness, args.conv_template, question) for question in questions]

    print(f"{'picture':<14} {'lmms-eval':<20} {'batched':<20} {'plain call':<20}")
    for question, *row in zip(questions, singly, together, plain, strict=True):
        print(f"{question.name:<14} " + " ".join(f"{answer[:20]:<20}" for answer in row))
    same = sum(one == two == three for one, two, three in zip(singly, together, plain, strict=True))
    model = harness.model
    print(f"{same} of {len(questions)} the same; {type(model).__module__}, reducer {model.reducer.spec}")
    return 0 if same == len(questions) else 1


def read_questions(folder: Path) -> list[Question]:
    """The pictures named in a folder's questions.json, {file name: question}."""
    index = folder / "questions.json"
    if not index.is_file():
        raise UserError(f"{index} is missing; it maps picture names to questions (--pictures).")
    return [
        Question(Path(name).stem, load_image(folder / name), text + SHORT)
        for name, text in json.loads(index.read_text(encoding="utf-8")).items()
    ]


def harness_of(args: argparse.Namespace) -> Any:
    """lmms-eval's model object."""
    try:
        from lmms_eval.models.simple.llava import Llava
    except ImportError as error:
        raise UserError(
            f"lmms-eval cannot be imported ({error}): pip install --no-deps --target outputs/lmms-eval "
            "lmms-eval==0.7.3 loguru pytz evaluate, then --lmms-eval outputs/lmms-eval."
        ) from error
    # Any other device_map is taken for a GPU's number there.
    return Llava(
        pretrained=args.model_path,
        conv_template=args.conv_template,
        device=args.device,
        device_map="auto" if args.device == "cpu" else args.device,
    )


def answers_of(harness: Any, questions: Sequence[Question], batch_size: int) -> list[str]:
    """As lmms-eval's evaluator asks a model."""
    from lmms_eval.api.instance import Instance

    harness.task_dict = {TASK: {SPLIT: questions}}
    harness.batch_size_per_gpu = batch_size
    metadata = {"task": TASK, "repeats": 1}
    requests = [
        Instance(
            "generate_until",
            (question.text, dict(GENERATION), lambda document: [document.image], number, TASK, SPLIT),
            number,
            metadata | {"doc_id": number},
        )
        for number, question in enumerate(questions)
    ]
    return [answer.strip() for answer in harness.generate_until(requests)]


@torch.inference_mode()
def plain_answer(harness: Any, conv_template: str, question: Question) -> str:
    """One prompt, one image, one call."""
    model, tokenizer = harness.model, harness.tokenizer
    conversation = conv_templates[conv_template].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question.text}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    processor = model.get_vision_tower().image_processor
    pixels = process_images([question.image], processor, model.config)
    new = model.generate(
        ids.to(model.device),
        images=pixels.to(torch.float16),
        max_new_tokens=GENERATION["max_new_tokens"],
        do_sample=False,
    )
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


if __name__ == "__main__":
    sys.exit(main())
