"""`llava serve`: answers equal to the local engine's, and nothing a client sends that ends the server."""

import asyncio
import base64
import contextlib
import io
import json
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import openai
import psutil
import pytest
from conftest import DEFAULT, KEY, LORA, PICTURES, SMALL
from PIL import Image
from reference import SPECS, greedy_ids, prompt_of

from llava.cli import main
from llava.mini.benchmarks import generate
from llava.mm_utils import load_image

NEW = 6
QUESTION = "What do you see?"


@pytest.fixture(scope="module")
def url(server, mini):
    """The server's address, from when it answers."""
    while not alive(server.url):
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        time.sleep(0.5)
    yield server.url
    assert server.process.poll() is None, server.log.read_text()[-4000:]


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


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def message(text: str, *urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ask(client, *messages: dict, reducer: str | None = None, **options):
    body = {} if reducer is None else {"mm_processor_kwargs": {"reducer": reducer}}
    return client.chat.completions.create(
        model=str(LORA),
        messages=messages,
        temperature=0,
        max_tokens=NEW,
        extra_body={"return_token_ids": True, **body, **options},
    )


def ask_about(client, name: str, reducer: str):
    return ask(client, message(QUESTION, data_url((PICTURES / name).read_bytes())), reducer=reducer)


def ids(reply) -> list[int]:
    return reply.choices[0].token_ids


COFFEE = data_url((PICTURES / "coffee.jpg").read_bytes())


def test_the_small_pope_through_eval_has_the_local_answers_and_visual_tokens(url, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    root = tmp_path / "mini"
    generate(root, seed=0, number=8)
    where = {"served": ["--endpoint", f"{url}/v1"], "local": [*SMALL, "--device", "cpu"]}
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


@pytest.fixture(scope="module")
def alone(client, pictures) -> dict[tuple[str, str], Future]:
    """The replies about each picture with each reducer, which are on their way."""
    pool = ThreadPoolExecutor()
    return {(name, spec): pool.submit(ask_about, client, name, spec) for spec in SPECS for name in pictures}


def test_ids_are_those_of_our_own_loader_and_generate(alone, client, mini, pictures):
    """Five pictures with five reducers; two pictures and two turns; text alone."""
    prompt = prompt_of("smollm2", f"<image>\n{QUESTION}")
    wanted = {job: greedy_ids(mini, prompt, [pictures[job[0]]], reducer=job[1], new=NEW) for job in alone}
    assert {job: ids(reply.result()) for job, reply in alone.items()} == wanted
    assert len(set(map(tuple, wanted.values()))) > len(pictures)
    cup, cat = pictures["coffee.jpg"], pictures["chelsea.jpg"]
    talk = [
        message(QUESTION, COFFEE, data_url(encoded(cat))),
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "And beside it?"},
    ]
    prompt = prompt_of("smollm2", f"<image>\n<image>\n{QUESTION}", "A cup.", "And beside it?")
    assert ids(ask(client, *talk)) == greedy_ids(mini, prompt, [cup, cat], reducer=DEFAULT, new=NEW)
    prompt = prompt_of("smollm2", "Name a fruit.")
    assert ids(ask(client, message("Name a fruit."))) == greedy_ids(mini, prompt, new=NEW)


def test_streamed_pieces_make_up_the_answer(client):
    turn = message("What is this?", COFFEE)
    whole = ask(client, turn).choices[0].message.content
    pieces = client.chat.completions.create(
        model=str(LORA), messages=[turn], temperature=0, max_tokens=NEW, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole


TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: turn by 90 degrees
TURNED_CAT = encoded(Image.open(PICTURES / "chelsea.jpg"), "JPEG", exif=TURNED)


def test_odd_pictures_are_decoded_as_by_our_own_loader(client, mini):
    """One pixel, 3000 x 2, transparent, turned by EXIF data."""
    files = [
        encoded(Image.new("RGB", (1, 1), "red")),
        encoded(Image.linear_gradient("L").resize((3000, 2))),
        encoded(Image.merge("RGBA", (Image.linear_gradient("L"),) * 4)),
        TURNED_CAT,
    ]
    reply = ask(client, message("What is this?", *map(data_url, files)))
    prompt = prompt_of("smollm2", "<image>\n" * len(files) + "What is this?")
    assert ids(reply) == greedy_ids(mini, prompt, list(map(load_image, files)), reducer=DEFAULT, new=NEW)


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))


def part(**content) -> dict:
    return {"role": "user", "content": [content]}


NAN = encoded(Image.fromarray(np.full((32, 32), np.nan, np.float32)), "TIFF")
BAD = {
    "truncated": (message("?", data_url(TURNED_CAT[:3000])), {}, "cut short"),
    "empty": (message("?", data_url(b"")), {}, "picture"),
    "NaN": (message("?", data_url(NAN)), {}, "not numbers"),
    "no base64": (message("?", "data:image/png;base64,@@@@"), {}, "base64"),
    "plain data": (message("?", "data:image/png,abc"), {}, "base64"),
    "too many pixels": (
        message("?", data_url(encoded(Image.new("1", (14000, 14000))))),
        {},
        "pixels",
    ),
    "forty pictures": (message("?", *[COFFEE] * 40), {}, "length"),
    "unknown reducer": (message("?", COFFEE), {"reducer": "prumergr"}, "prumergr"),
    "no tokens": (message("?", COFFEE), {"reducer": "topk(tokens=0)"}, "tokens"),
    "a number as reducer": (message("?", COFFEE), {"reducer": 5}, "reducer"),
    "a reducer without its question": (message("?", COFFEE), {"reducer": "cdpruner"}, "question"),
    "unknown keyword": (message("?", COFFEE), {"mm_processor_kwargs": {"patches": 3}}, "patches"),
    "device": (message("?", COFFEE), {"mm_processor_kwargs": {"device": "cuda"}}, "device"),
    "more <image> than pictures": (message("<image> <image>", COFFEE), {}, "<image>"),
    "address": (message("?", "http://127.0.0.1:1/x.png"), {}, "--allowed-media-domains"),
    "video": (
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": COFFEE}}]},
        {},
        "video",
    ),
    "file": (message("?", "file:///etc/hostname"), {}, "--allowed-local-media-path"),
    "too long": (message("word " * 5000), {}, "length"),
    "embeddings": (part(type="image_embeds", image_embeds="AAAA"), {}, "embeds"),
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


def test_two_hundred_requests_at_once_with_twenty_clients_gone_midway(alone, client, url, server, pictures):
    alone = {job: reply.result() for job, reply in alone.items()}
    counts = {spec: {alone[name, spec].usage.prompt_tokens for name in pictures} for spec in SPECS}
    assert len(counts["prumerge"]) > max(len(counts["none"]), len(counts["topk(tokens=16)"]))  # adaptive
    before = memory(server)
    draw = random.Random(0)
    todo = draw.choices(list(alone), k=220)
    leaves = {place: draw.uniform(0.05, 2) for place in draw.sample(range(220), 20)}

    async def one(many, place: int):
        try:
            return await asyncio.wait_for(ask_about(many, *todo[place]), leaves.get(place))
        except TimeoutError:
            return None

    async def storm() -> list:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key=KEY, max_retries=2, timeout=900
        ) as many:
            return await asyncio.gather(*(one(many, place) for place in range(220)))

    found = asyncio.run(storm())
    assert None in found
    for place, reply in enumerate(found):
        if reply is None:
            assert place in leaves
        else:
            wanted = alone[todo[place]]
            assert ids(reply) == ids(wanted) and reply.usage.prompt_tokens == wanted.usage.prompt_tokens
    while any(value for name, value in metrics(url).items() if name.startswith("vllm:num_requests_")):
        time.sleep(0.1)
    assert metrics(url)["vllm:kv_cache_usage_perc"] == 0  # what the clients who left had taken is back
    assert memory(server) < before * 1.15


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:")]
    return {name.partition("{")[0]: float(value) for name, value in pairs}


def memory(server) -> int:
    """Bytes in use by all processes of the server."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
