"""`llava serve`: answers equal to the local engine's, and nothing a client sends that ends the server."""

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from conftest import BASE, LORA, ROOT
from PIL import Image
from reference import greedy_ids, prompt_of

from llava.cli import main
from llava.mini.benchmarks import generate

DEFAULT = "prumerge+(max_tokens=144)"
SPECS = ("none", "prumerge", DEFAULT, "topk(tokens=97)")
KEY = "of-the-tests"


@pytest.fixture(scope="module")
def url(mini, tmp_path_factory):
    """The address of a server of the small model, a LoRA checkpoint; ended after the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable,
        "-m",
        "llava.cli",
        "serve",
        "--model-path",
        str(LORA),
        "--model-base",
        str(BASE),
    ]
    command += ["--reducer", DEFAULT, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--api-key", KEY, "--max-model-len", "2048", "--gpu-memory-utilization", "0.05"]
    environment = {
        n: v for n, v in os.environ.items() if n not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
    }
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while not alive(address):
            assert server.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address
        assert server.poll() is None, log.read_text()[-4000:]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def alive(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


@pytest.fixture(scope="module")
def client(url):
    """The official client, which repeats what failed with status 5xx.

    vLLM 0.32 answers 500 once where a request refused after the processor had run (too long, say) has left
    the caches of front end and engine different; it then puts that right.
    """
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=2, timeout=600)


def picture(file: Path) -> str:
    return data_url(file.read_bytes())


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def message(text: str, *urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ask(client, *messages: dict, reducer: str | None = None, tokens: int = 8, **options):
    body = {} if reducer is None else {"mm_processor_kwargs": {"reducer": reducer}}
    return client.chat.completions.create(
        model=str(LORA), messages=messages, temperature=0, max_tokens=tokens, extra_body=body | options
    )


def text_of(mini, prompt: str, images=(), *, reducer: str = DEFAULT, tokens: int = 8) -> str:
    ids = greedy_ids(mini, prompt, images, reducer=reducer, new=tokens)
    return mini[0].decode(ids, skip_special_tokens=True)


COFFEE = picture(ROOT / "playground/pictures/coffee.jpg")


def test_the_small_pope_through_eval_has_the_local_answers_and_visual_tokens(url, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    root = tmp_path / "mini"
    generate(root, seed=0, number=8)
    where = {
        "served": ["--endpoint", f"{url}/v1"],
        "local": [
            "--model-path",
            str(LORA),
            "--model-base",
            str(BASE),
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ],
    }
    texts, facts = {}, {}
    for name, flags in where.items():
        answers = tmp_path / f"{name}.jsonl"
        how = ["--root", str(root), "--reducer", "prumerge", "--max-new-tokens", "4"]
        assert main(["eval", "pope", *flags, *how, "--answers", str(answers)]) == 0
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        texts[name] = {row["question_id"]: row["text"] for row in rows}
        facts[name] = json.loads(answers.with_suffix(".provenance.json").read_text())
    assert texts["served"] == texts["local"]
    assert len(texts["local"]) == 144 and len(set(texts["local"].values())) > 1
    for part in ("visual_tokens", "images"):
        assert facts["served"]["summary"][part] == facts["local"]["summary"][part]
    assert facts["served"]["score"] == facts["local"]["score"]


def test_streamed_pieces_make_up_the_answer(client):
    whole = ask(client, message("What is this?", COFFEE)).choices[0].message.content
    pieces = client.chat.completions.create(
        model=str(LORA), messages=[message("What is this?", COFFEE)], temperature=0, max_tokens=8, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole


def test_turns_and_several_pictures(client, mini, pictures):
    cup, cat = pictures["coffee.jpg"][0], pictures["chelsea.jpg"][0]
    turns = [
        message("What do you see?", COFFEE, data_url(encoded(cat))),
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "And beside it?"},
    ]
    prompt = prompt_of("smollm2", "<image>\n<image>\nWhat do you see?", "A cup.", "And beside it?")
    assert ask(client, *turns).choices[0].message.content == text_of(mini, prompt, [cup, cat])


TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: turn by 90 degrees
ODD = {
    "one pixel": encoded(Image.new("RGB", (1, 1), "red")),
    "3000 x 2": encoded(Image.linear_gradient("L").resize((3000, 2))),
    "transparent": encoded(Image.merge("RGBA", (Image.linear_gradient("L"),) * 4)),
    "turned by EXIF": encoded(Image.open(ROOT / "playground/pictures/chelsea.jpg"), "JPEG", exif=TURNED),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_decoded_as_by_our_own_loader(client, mini, name):
    from llava.mm_utils import load_image

    reply = ask(client, message("What is this?", data_url(ODD[name])))
    wanted = text_of(mini, prompt_of("smollm2", "<image>\nWhat is this?"), [load_image(ODD[name])])
    assert reply.choices[0].message.content == wanted


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))


NAN = encoded(Image.fromarray(np.full((32, 32), np.nan, np.float32)), "TIFF")
BAD = {
    "truncated": (message("?", data_url(ODD["turned by EXIF"][:3000])), {}, "cut short"),
    "empty": (message("?", data_url(b"")), {}, "picture"),
    "50 MB of no picture": (message("?", data_url(b"x" * 50_000_000)), {}, "picture"),
    "NaN": (message("?", data_url(NAN)), {}, "not numbers"),
    "no base64": (message("?", "data:image/png;base64,@@@@"), {}, "base64"),
    "plain data": (message("?", "data:image/png,abc"), {}, "base64"),
    "too many pixels": (
        message("?", data_url(encoded(Image.new("1", (14000, 14000))))),
        {},
        "too many pixels",
    ),
    "forty pictures": (message("?", *[COFFEE] * 40), {"reducer": "none"}, "length"),
    "unknown reducer": (message("?", COFFEE), {"reducer": "prumergr"}, "prumergr"),
    "no tokens": (message("?", COFFEE), {"reducer": "topk(tokens=0)"}, "tokens"),
    "a number as reducer": (message("?", COFFEE), {"reducer": 5}, "reducer"),
    "a reducer without its question": (message("?", COFFEE), {"reducer": "cdpruner"}, "question"),
    "unknown keyword": (message("?", COFFEE), {"mm_processor_kwargs": {"patches": 3}}, "patches"),
    "device": (message("?", COFFEE), {"mm_processor_kwargs": {"device": "cuda"}}, "device"),
    "more <image> than pictures": (message("<image> <image>", COFFEE), {}, "<image>"),
    "address": (message("?", "http://127.0.0.1:1/x.png"), {}, "--allowed-media-domains"),
    "file": (message("?", "file:///etc/hostname"), {}, "--allowed-local-media-path"),
    "too long": (message("word " * 5000), {}, "length"),
    "embeddings": (
        {"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]},
        {},
        "embeds",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_answered_with_what_is_wrong(client, url, name):
    turn, options, named = BAD[name]
    with pytest.raises(openai.BadRequestError, match=named):
        ask(client, turn, **options)
    assert alive(url)


FINE = {
    "an <image> without a picture": (message("What does <image> mean?"), {}),
    "50 MB": (message("?", data_url(encoded(noise(4100, 4100, 3), "BMP"))), {}),
    "log probabilities of the prompt": (
        message("?", COFFEE),
        {"reducer": "topk(tokens=4)", "prompt_logprobs": 1},
    ),
    "penalties": (message("?", COFFEE), {"repetition_penalty": 1.2, "presence_penalty": 0.5}),
    "words of its own for decoding": (
        message("?", COFFEE),
        {"media_io_kwargs": {"image": {"image_mode": None}}},
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_what_might_end_an_engine_is_answered(client, url, name):
    turn, options = FINE[name]
    assert ask(client, turn, **options).choices[0].message.content
    assert ask(client, message("What is this?", COFFEE)).choices[0].message.content
    assert alive(url)


def test_a_wrong_key_is_refused(client):
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"), message("?", COFFEE))


def test_two_hundred_requests_at_once_with_twenty_clients_gone_midway(client, url, pictures):
    jobs = [(name, spec) for name in pictures for spec in SPECS]
    alone = {
        (name, spec): outcome(ask(client, *turns(name, pictures), reducer=spec, tokens=4))
        for name, spec in jobs
    }
    counts = {spec: {alone[name, spec][1] for name in pictures} for spec in SPECS}
    assert all(
        len(counts["prumerge"]) > len(counts[spec]) for spec in ("none", "topk(tokens=97)")
    )  # adaptive
    before = memory(url)
    draw = random.Random(0)
    todo = [draw.choice(jobs) for _ in range(220)]
    leaves = {place: draw.uniform(0.05, 2) for place in draw.sample(range(220), 20)}

    async def one(many, place: int):
        name, spec = todo[place]
        request = ask(many, *turns(name, pictures), reducer=spec, tokens=4)
        try:
            return outcome(await asyncio.wait_for(request, leaves.get(place)))
        except TimeoutError:
            return "gone"

    async def storm() -> list:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key=KEY, max_retries=2, timeout=900
        ) as many:
            return await asyncio.gather(*(one(many, place) for place in range(220)))

    found = asyncio.run(storm())
    assert "gone" in found
    for place, job in enumerate(todo):
        assert found[place] == alone[job] or (place in leaves and found[place] == "gone")
    while any(value for name, value in metrics(url).items() if name.startswith("vllm:num_requests_")):
        time.sleep(0.1)
    assert metrics(url)["vllm:kv_cache_usage_perc"] == 0  # what the clients who left had taken is back
    assert memory(url) < before * 1.15


def turns(name: str, pictures) -> list[dict]:
    return [message(pictures[name][1], picture(ROOT / "playground/pictures" / name))]


def outcome(reply) -> tuple[str, int]:
    return reply.choices[0].message.content, reply.usage.prompt_tokens


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:")]
    return {name.partition("{")[0]: float(value) for name, value in pairs}


def memory(url: str) -> int:
    """Bytes in use by all processes of the server."""
    port = url.rpartition(":")[2]
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            words = (folder / "cmdline").read_bytes().split(b"\0")
            found[int(folder.name)] = int(status["PPid"]), int(status.get("VmRSS", "0 kB").split()[0]), words
    tree = {pid for pid, (_, _, words) in found.items() if port.encode() in words}
    while more := {pid for pid, (parent, _, _) in found.items() if parent in tree} - tree:
        tree |= more
    return 1024 * sum(found[pid][1] for pid in tree)
