"""Where a checkpoint is: a directory on this machine, or a repository of the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llava.errors import UserError, first_line

try:
    import httpx2 as httpx  # what huggingface_hub 2 speaks HTTP with; 1 does with httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

HUB_ERRORS = (OSError, HfHubHTTPError, HFValidationError, httpx.HTTPError)
"""What asking the Hub ends with where there is no such repository, or no connection."""

WANTED = ["*.json", "*.model", "*.txt", "*.jinja", "*.safetensors", "*.bin"]
UNWANTED = ["*/*", "training_args.bin", "optimizer.bin"]
PICKLED = "pytorch_model*.bin"


def resolve_beside(name: str, beside: Path | None = None) -> Path | None:
    """The local directory `name` means: as given, else relative to `beside` and each of its parents."""
    candidates = [Path(name).expanduser()]
    if beside is not None and not candidates[0].is_absolute():
        here = beside.resolve()
        candidates += [folder / name for folder in (here, *here.parents)]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def resolve_directory(
    name: str | Path,
    *,
    beside: Path | None = None,
    remedy: str = "--model-path PATH",
    only: Sequence[str] = (),
) -> Path:
    """A local directory of that name, else the Hub's repository, downloaded now or earlier.

    Args:
        name: a directory, or `owner/name` on the Hub. A local directory always wins.
        beside: where relative names inside a checkpoint are looked for too.
        remedy: the flag to name where it cannot be found.
        only: download the files of these patterns and no weights.

    Raises:
        UserError: neither here nor on the Hub, or the Hub cannot be reached.
    """
    text = str(name)
    if (local := resolve_beside(text, beside) if text.strip() else None) is not None:
        return local
    if Path(text).expanduser().is_file():
        raise UserError(f"{text} is a file: pass the directory it lies in ({remedy})")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        raise UserError(
            f"there is no directory {text or repr(text)}: pass {remedy}, or a Hub name such as owner/name"
        )
    try:
        if only:
            return Path(snapshot_download(text, allow_patterns=list(only)))
        # A repository that holds its model in both formats is downloaded in one.
        found = Path(snapshot_download(text, allow_patterns=WANTED, ignore_patterns=[*UNWANTED, PICKLED]))
        if not any(found.glob("model*.safetensors")):
            snapshot_download(text, allow_patterns=[PICKLED], ignore_patterns=UNWANTED)
        return found
    except HUB_ERRORS as error:
        raise UserError(
            f"{text} is not a directory here and was not found on the Hub ({first_line(error)}): download it "
            f"where there is a network (`hf download {text} --local-dir DIR`) and pass {remedy}"
        ) from error
