"""`llava tools push DIR OWNER/NAME`: a checkpoint on the Hub, with a model card that says what it is.

The card tells reducer, base, vision tower, data and scores, and how to load the checkpoint. It is made from
the checkpoint's own files, `--data` and `--scores` (what `llava report --json FILE` wrote); a README.md that
lies in the directory is sent as it is instead. Training state (checkpoint-N, optimizer, logs) stays here.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects

from llava.errors import UserError, first_line
from llava.model.checkpoints import KINDS, CheckpointInfo, inspect_checkpoint, llava_config_dict, read_json
from llava.model.checkpoints.locate import HUB_ERRORS

NOT_SENT = [
    "checkpoint-*",
    ".*",
    "runs/*",
    "*.log",
    "log.jsonl",
    "*.pt",
    "*.pth",
    "training_args.bin",
    "*_state.*",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="any LLaVA, LoRA or llava-hf checkpoint")
    parser.add_argument("repository", metavar="OWNER/NAME", help="made if it is not there")
    parser.add_argument("--model-base", help="the base's name for the card, if not as the checkpoint has it")
    parser.add_argument("--data", help='what it was trained on, e.g. "LLaVA-1.5 665K"')
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="its scores, as `llava report DIR --json FILE` wrote them"
    )
    parser.add_argument(
        "--license", default="other", help="of the weights, as the Hub names it: llama2, mit, ..."
    )
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print card and files; no network")


def run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", args.repository):
        raise UserError(f"{args.repository!r} is no repository: write OWNER/NAME")
    info = inspect_checkpoint(args.checkpoint)
    if not info.is_llava and info.kind not in ("lora", "projector"):
        raise UserError(f"{info.path} is {KINDS[info.kind]}: push takes a LLaVA checkpoint")
    own_card = info.path / "README.md"
    runs = [] if args.scores is None else scores_in(args.scores)
    base = args.model_base or (info.declared_base if info.needs_base else "")
    card = card_of(info, args.repository, base, license=args.license, data=args.data, runs=runs)
    text = own_card.read_text(encoding="utf-8") if own_card.is_file() else str(card)
    everything = sorted(str(f.relative_to(info.path)) for f in info.path.rglob("*") if f.is_file())
    files = [
        name for name in filter_repo_objects(everything, ignore_patterns=NOT_SENT) if name != "README.md"
    ]
    for what, flag in ((base, "--model-base"), (tower_of(info), "--vision-tower")):
        if what and is_local(what):
            print(f"note: {what} is a directory of this machine; others have to give {flag}", file=sys.stderr)
    if args.dry_run:
        print(text)
        print("README.md", *files, sep="\n")
        return 0
    api = HfApi()
    try:
        api.create_repo(args.repository, private=args.private, exist_ok=True)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=args.repository)
        api.upload_folder(
            repo_id=args.repository, folder_path=info.path, ignore_patterns=[*NOT_SENT, "README.md"]
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"{args.repository} was not written on the Hub ({first_line(error)}): log in with `hf auth "
            "login`, look at the name and the network, and give the same command again"
        ) from error
    print(f"https://huggingface.co/{args.repository}")
    return 0


def scores_in(file: Path) -> list[dict[str, Any]]:
    """The scored runs of a file that `llava report --json` wrote.

    Raises:
        UserError: it is not such a file.
    """
    runs = read_json(file).get("runs")
    wanted = ("benchmark", "reducer", "score", "visual_tokens", "partial")
    if not isinstance(runs, list) or not all(isinstance(r, dict) and r.keys() >= {*wanted} for r in runs):
        raise UserError(f"{file} is not what `llava report DIR --json FILE` writes")
    return [run for run in runs if run["score"] is not None]


def card_of(
    info: CheckpointInfo,
    repository: str,
    base: str,
    *,
    license: str,
    data: str | None,
    runs: list[dict[str, Any]],
) -> ModelCard:
    """The model card, its metadata in front."""
    config = llava_config_dict(info)
    reducer = config.get("mm_token_reducer", "none")
    whole = [run for run in runs if not run["partial"]]
    metadata = ModelCardData(
        model_name=repository.split("/")[1],
        license=license,
        library_name="llava",
        pipeline_tag="image-text-to-text",
        tags=["llava", "prumerge", "visual-token-reduction"],
        base_model=base if base and not is_local(base) else None,
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=run["benchmark"],
                dataset_name=f"{run['benchmark']}, reducer {run['reducer']}",
                metric_type="score",
                metric_value=round(run["score"], 2),
            )
            for run in whole
        ]
        or None,
    )
    facts = {
        "what it is": KINDS[info.kind],
        "token reducer": f"`{reducer}`",
        "base": base or "none needed",
        "vision tower": tower_of(info) or "inside",
        "trained on": data or "not said",
    }
    command = (
        f"llava chat --model-path {repository}{f' --model-base {base}' if base else ''} --image-file a.jpg"
    )
    lines = [f"# {repository.split('/')[1]}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [
        "",
        "Visual tokens are reduced as the checkpoint records; `--reducer` asks for another reducer.",
        "",
    ]
    lines += ["```bash", command, "```", ""]
    if runs:
        lines += ["| benchmark | reducer | visual tokens an image | score |", "|---|---|---|---|"]
        for run in runs:
            tokens = "" if run["visual_tokens"] is None else f"{run['visual_tokens']:.1f}"
            part = " (a part of the benchmark)" if run["partial"] else ""
            lines.append(f"| {run['benchmark']} | `{run['reducer']}` | {tokens} | {run['score']:.1f}{part} |")
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def tower_of(info: CheckpointInfo) -> str:
    return llava_config_dict(info).get("mm_vision_tower") or ""


def is_local(name: str) -> bool:
    return Path(name).is_absolute() or Path(name).is_dir()
