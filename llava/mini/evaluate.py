"""`llava mini evaluate`: the test bed that compares reducers, on scenes the model never saw.

Every question of a world (`llava mini world --split dev` or `test`) is scored for every reducer at every
number of tokens, in one forward pass a scene and reducer: the questions about a picture stand one behind
another, each sees the picture and itself, and the probability of each right answer is read off. A question
counts as right where every token of the right answer, its end included, is the likeliest: where greedy
decoding says just that.

OUT gets a file of answers for each reducer and number, appended scene by scene (the same command goes on
where it was), table.md, table.json, and accuracy.png, accuracy against tokens.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.eval.reading import read_rows
from llava.eval.store import AnswersFile
from llava.files import read_json, write_json
from llava.mini.comparison import write_report

REDUCERS = (
    *("prumerge+", "prumerge", "random", "topk", "pool", "visionzip", "scope", "vispruner", "divprune"),
    *("hiprune", "holov", "tome", "evit", "mmtok"),
)
COUNTS = (16, 32, 64, 144)
VERSION = "smollm2"  # conversation template of the small model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", default="checkpoints/mini-lora")
    parser.add_argument("--model-base", default="checkpoints/mini-base")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `llava mini world`")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers, table and plot")
    parser.add_argument("--reducers", nargs="+", metavar="SPEC", help=f"default: {', '.join(REDUCERS)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="of each (default: 16 32 64 144)")
    parser.add_argument("--scenes", type=int, default=None, help="only the first so many scenes")
    parser.add_argument("--device", default="cuda", help="default: cuda, or the CPU where there is none")


def run(args: argparse.Namespace) -> int:
    from llava.engine import ModelSource

    specs = args.reducers
    if args.tokens or not args.reducers:
        names, counts = args.reducers or REDUCERS, args.tokens or COUNTS
        specs = ["none", *(f"{name}(tokens={count})" for count in counts for name in names)]
    scenes = read_scenes(args.data)
    chosen = list(scenes)[: args.scenes]
    check_settings(args)
    with ExitStack() as opened:
        files: dict[str, AnswersFile] = {}
        rows: dict[str, dict[str, dict]] = {}  # of each reducer, by picture
        for spec in specs:
            name = re.sub(r"[^A-Za-z0-9=]+", "-", spec.replace("+", "-plus")).strip("-")
            lines = [{"question_id": image, "prompt": spec} for image in scenes]
            files[spec] = opened.enter_context(AnswersFile(args.out / f"{name}.jsonl", lines))
            there = (json.loads(line) for _, line in files[spec].answered().values())
            rows[spec] = {row["question_id"]: row for row in there}
        if any(image not in there for there in rows.values() for image in chosen):
            source = ModelSource(args.model_path, args.model_base, conv_mode=VERSION, device=args.device)
            ask(source.load(), args.data, {image: scenes[image] for image in chosen}, files, rows)
    write_report(args.out, [question for image in chosen for question in scenes[image]], rows)
    print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


def read_scenes(folder: Path) -> dict[str, list[dict]]:
    """The rows of questions.jsonl by picture."""
    index = folder / "questions.jsonl"
    if not index.is_file():
        raise UserError(
            f"{index} is missing; `llava mini world --edition 2 --split dev --n 300 --out {folder}` makes it."
        )
    scenes: dict[str, list[dict]] = {}
    for _, row in read_rows(index, dict):
        scenes.setdefault(row["image"], []).append(row)
    return scenes


def check_settings(args: argparse.Namespace) -> None:
    """Answers of another model or another world must not mix with these."""
    about = read_json(args.data / "world.json")
    world = {key: value for key, value in about.items() if not isinstance(value, dict)}
    wanted = {"model": args.model_path, "base": args.model_base, "world": world}
    file = args.out / "settings.json"
    if file.exists() and read_json(file) != wanted:
        raise UserError(f"{args.out} holds answers of another model or world: choose another --out.")
    write_json(file, wanted)


@torch.inference_mode()
def ask(
    engine: Any,
    data: Path,
    scenes: Mapping[str, Sequence[dict]],
    files: Mapping[str, AnswersFile],
    rows: Mapping[str, dict[str, dict]],
) -> None:
    """Adds what is missing to `files` and `rows`, a row a scene and reducer: {"question_id": the picture,
    "prompt": the reducer, "tokens", "answers": {question_id: answer}}.

    Scene by scene, so that at any moment all reducers have answered about the same ones.
    """
    from llava.mm_utils import load_image, process_images
    from llava.reducers import build_reducer

    model = engine.model
    tower = model.get_vision_tower()
    reducers = {spec: build_reducer(spec) for spec in files}
    reads = {name for reducer in reducers.values() for name in reducer.asks}
    for image, asked in tqdm(scenes.items(), "scenes", file=sys.stderr):
        missing = [spec for spec in files if image not in rows[spec]]
        if not missing:
            continue
        pixels = process_images([load_image(data / image)], engine.image_processor, model.config)
        features = model.with_projected(tower(pixels, reads), reads)  # once for all reducers
        for spec in missing:
            reducer = reducers[spec]
            # A reducer that reads the question keeps other tokens for each.
            groups = [[question] for question in asked] if reducer.reads_question else [asked]
            answers: dict[str, dict] = {}
            for group in groups:
                read = engine.read_question(group[0]["text"], reducer)
                seen = replace(features, **{name: [value] for name, value in read.items()})
                (visual,) = model.project(reducer(seen).unbind())
                scored = score(model, engine.tokenizer, visual, group)
                answers |= {str(q["question_id"]): one for q, one in zip(group, scored, strict=True)}
            row = {"question_id": image, "prompt": spec, "tokens": len(visual), "answers": answers}
            files[spec].append(row)
            rows[spec][image] = row


def score(model: Any, tokenizer: Any, visual: Tensor, questions: Sequence[dict]) -> list[dict]:
    """How likely the right answers of all questions about one picture [K, hidden] are, in one pass.

    The sequence is: system prompt and picture, question and answer, question and answer ... A question sees
    what is before the first one, and itself; its positions go on from there. So it is as if asked alone.

    Returns:
        For each question `right`, whether greedy decoding gives its answer; `logprob`, of that answer with
        its end; and `margin`, the logit of Yes minus that of No as the first token.
    """
    from llava.data import encode_conversation

    encoded = []
    for question in questions:
        turns = [{"from": "human", "value": f"<image>\n{question['text']}"}]
        turns.append({"from": "gpt", "value": question["answer"]})
        encoded.append(encode_conversation(turns, tokenizer, VERSION, has_image=True))
    place = encoded[0][0].tolist().index(IMAGE_TOKEN_INDEX)
    embed = model.get_input_embeddings()
    own = [ids[place + 1 :] for ids, _ in encoded]
    targets = [labels[place + 1 :] for _, labels in encoded]
    opening = torch.cat([embed(encoded[0][0][:place].to(model.device)), visual.to(model.dtype)])
    embeds = torch.cat([opening, embed(torch.cat(own).to(model.device))])
    # owner: -1 for the opening, else the question's number.
    owner = torch.cat(
        [torch.full((len(opening),), -1), *(torch.full((len(ids),), n) for n, ids in enumerate(own))]
    )
    mask = (owner[None, :] == owner[:, None]) | (owner[None, :] == -1)
    mask &= torch.ones_like(mask).tril()
    positions = [torch.arange(len(opening)), *(len(opening) + torch.arange(len(ids)) for ids in own)]
    hidden = model.get_model()(
        inputs_embeds=embeds[None],
        attention_mask=mask[None, None].to(model.device),
        position_ids=torch.cat(positions)[None].to(model.device),
        use_cache=False,
    ).last_hidden_state[0, len(opening) :]
    labels = torch.cat(targets)
    scored = (labels != IGNORE_INDEX).nonzero().flatten()  # each is predicted one position before it
    logits = model.lm_head(hidden[scored - 1]).float()
    wanted = labels[scored].to(model.device)
    likeliest = (logits.argmax(-1) == wanted).float()
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    # One transfer for all questions: on a GPU that several processes share, each waits for its turn.
    table = torch.stack([likeliest, chosen, logits[:, yes] - logits[:, no]]).cpu()
    answers = []
    for right, logprob, margin in table.split([int((one != IGNORE_INDEX).sum()) for one in targets], dim=1):
        answer = {"right": bool(right.all()), "logprob": round(float(logprob.sum()), 4)}
        answers.append(answer | {"margin": round(float(margin[0]), 4)})
    return answers
