"""The web demo: one real server, driven by a headless Chromium, compared with the engine's own answers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_checkpoints import edit_json, family

from llava.engine import Answer, ModelSource, Request, finish
from llava.errors import UserError
from llava.mm_utils import load_image

gradio = pytest.importorskip("gradio", reason="no Gradio: pip install 'llava[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

SPEC = "prumerge+(tokens=144)"
"""What checkpoints/mini-lora records."""
LONG = 120_000
"""Milliseconds; the machine may be busy."""


@pytest.fixture(scope="module")
def server(root, mini, tmp_path_factory):
    """`llava demo` without a setting but the port. Its temporary files go to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "TMPDIR": str(folder), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "llava.cli", "demo", "--port", str(port)]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield SimpleNamespace(process=process, folder=folder, port=port)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def engine(mini, server):  # the server loads at the same time
    return ModelSource(*map(str, mini)).load()


@pytest.fixture(scope="module")
def browser(server, engine):
    assert server.process.stdout.readline().strip() == f"http://127.0.0.1:{server.port}"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page in a session of its own. No page may throw, or ask anybody but the server."""
    contexts, asked, thrown = [], set(), []

    def visit(width: int = 1280, height: int = 900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: thrown.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}")
        playwright.expect(page.get_by_label("Question")).to_have_value(re.compile("dog"), timeout=LONG)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert thrown == [] and {one for one in asked if one} == {f"127.0.0.1:{server.port}"}


def upload(page, path: Path) -> None:
    """A picture from a file; returns when it is shown."""
    before = page.locator("svg.view image").first.get_attribute("href")
    page.set_input_files("input[type=file]", path)
    page.wait_for_function(
        "before => document.querySelector('svg.view image')?.getAttribute('href') != before", arg=before
    )


def ask(page, question: str) -> str:
    """The answer, without the line about what it took."""
    said = page.get_by_test_id("bot").nth(page.get_by_test_id("bot").count())
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    playwright.expect(said).to_contain_text("visual tokens", timeout=LONG)
    return said.inner_text().split("\n")[0].strip()


def tokens_shown(page, count: int) -> None:
    playwright.expect(page.locator("figure.kept")).to_have_attribute("data-tokens", str(count), timeout=LONG)


def picture(name: str) -> Path:
    return Path(__file__).parent.parent / "playground/pictures" / name


def kept_by(engine, name: str, spec: str) -> SimpleNamespace:
    """What the engine says became of the patches."""
    reduced = engine.look(picture(name), Request(reducer=spec)).reduced[0]
    return SimpleNamespace(
        tokens=int(reduced.lengths), row=reduced.source[0].tolist(), kept=reduced.kept[0].tolist()
    )


@in_browser
def test_a_picture_is_uploaded_and_asked_about_and_the_answer_streams(visit, engine):
    page = visit()
    upload(page, picture("scene-1.jpg"))
    page.evaluate(
        """() => { window.seen = new Set();
        const look = () => document.querySelectorAll("[data-testid=bot]")
            .forEach(bot => seen.add(bot.innerText.trim()));
        const all = {subtree: true, childList: true, characterData: true};
        new MutationObserver(look).observe(document.body, all);
        }"""
    )
    answer = finish(engine.stream(Request(text="What do you see?", images=[picture("scene-1.jpg")])))
    assert ask(page, "What do you see?") == answer.text
    pieces = [text for text in page.evaluate("[...seen]") if text and answer.text.startswith(text)]
    assert len(set(pieces)) > 2  # it was there in parts before it was whole
    assert f"{answer.visual_tokens[0]} visual tokens" in page.get_by_test_id("bot").last.inner_text()
    # The conversation goes on: the second question is asked with the first turn before it.
    turns = [("user", "What do you see?"), ("assistant", answer.text), ("user", "What color is the circle?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    second = finish(engine.stream(Request(messages=messages, images=[picture("scene-1.jpg")])))
    assert ask(page, "What color is the circle?") == second.text


@in_browser
def test_pointing_at_a_kept_patch_lights_up_what_was_merged_into_it(visit, engine):
    page = visit()
    upload(page, picture("coffee.jpg"))
    wanted = kept_by(engine, "coffee.jpg", SPEC)
    tokens_shown(page, wanted.tokens)
    svg = page.locator("svg.view")
    assert json.loads(svg.get_attribute("data-row")) == wanted.row
    token = max(range(wanted.tokens), key=wanted.row.count)  # the one that stands for most patches
    patch = wanted.kept[token]
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    cell = box["width"] / 24
    page.mouse.move(box["x"] + cell * (patch % 24 + 0.5), box["y"] + cell * (patch // 24 + 0.5))
    squares = svg.locator("clipPath path").get_attribute("d")
    lit = [int(row) * 24 + int(column) for column, row in re.findall(r"M(\d+) (\d+)h1v1", squares)]
    assert lit == [at for at, row in enumerate(wanted.row) if row == token] and len(lit) > 2
    playwright.expect(svg).to_have_class("view lit")
    assert f"{len(lit) - 1} patches" in page.locator(".told").inner_text()
    page.mouse.move(5, 5)
    playwright.expect(svg).to_have_class("view")
    # By the keyboard: from the middle one to the right.
    svg.focus()
    page.keyboard.press("ArrowRight")
    assert svg.get_attribute("data-at") == str(12 * 24 + 13)
    assert page.locator(".told").inner_text() != page.locator(".told").get_attribute("data-hint")


@in_browser
def test_method_and_budget_change_what_is_kept(visit, engine):
    page = visit()
    page.get_by_label("Method").click()
    page.get_by_role("option", name="topk").click()
    tokens_shown(page, 144)
    page.get_by_label("number input for Tokens at most").fill("32")
    page.keyboard.press("Tab")
    tokens_shown(page, 32)
    wanted = kept_by(
        engine, "chelsea.jpg", "topk(tokens=32)"
    )  # the first example, which the page begins with
    assert json.loads(page.locator("svg.view").get_attribute("data-row")) == wanted.row
    page.get_by_label("Method").click()
    page.get_by_role("option", name="none").click()
    tokens_shown(page, 576)


SCREENSHOTS = os.environ.get("DEMO_SCREENSHOTS")
"""Where the pictures for the docs go; unset: nowhere that lasts."""


@in_browser
def test_the_answer_beside_that_of_all_tokens_and_nothing_is_clipped_on_any_screen(visit, engine, tmp_path):
    page = visit()
    page.get_by_role("button", name="Example 4").click()
    asked = Request(text="What color is the circle?", images=[picture("scene-1.jpg")], max_new_tokens=256)
    playwright.expect(page.get_by_label("Question")).to_have_value(asked.text)
    if SCREENSHOTS:  # the docs show an answer as well
        ask(page, asked.text)
    turns = page.get_by_test_id("bot").count()
    page.get_by_role("button", name="Compare").click()
    playwright.expect(page.locator(".compare .total")).to_have_count(2, timeout=LONG)
    for card, spec in zip(page.locator(".compare article").all(), ("none", SPEC), strict=True):
        answer = finish(engine.stream(replace(asked, reducer=spec)))
        assert card.locator(".answer").inner_text() == answer.text
        assert card.locator(".visual dd").inner_text() == str(answer.visual_tokens[0])
        for phase in ("vision", "prefill", "total"):
            assert int(re.sub(r"\D", "", card.locator(f".{phase} dd").inner_text())) > 0
    assert page.get_by_test_id("bot").count() == turns  # a comparison is no turn of the conversation

    for name, width, scheme in (("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 390, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        file = Path(SCREENSHOTS or tmp_path) / f"demo-{name}.png"
        page.screenshot(path=file, full_page=True, animations="disabled")
        with Image.open(file) as sheet:
            assert sheet.width == width  # no scrolling to the side
            assert (sum(sheet.convert("RGB").getpixel((4, 4))) > 600) is (scheme == "light")
            if SCREENSHOTS:  # small enough for a repository
                sheet.convert("RGB").quantize(256, kmeans=3).save(file, optimize=True)
        everything = "[...document.querySelectorAll('#columns *, .compare *')]"
        assert max(page.evaluate(f"{everything}.map(e => e.getBoundingClientRect().right)")) <= width
    assert page.locator("img:not([alt])").count() == 0


@in_browser
def test_what_cannot_be_done_is_a_notice_and_the_page_lives_on(visit, engine, tmp_path):
    page = visit()
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(picture("coffee.jpg").read_bytes()[:9000])
    page.set_input_files("input[type=file]", torn)
    notice = page.get_by_test_id("toast-body")
    playwright.expect(notice).to_contain_text("torn.jpg", timeout=LONG)
    page.get_by_test_id("toast-close").click()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11 * 2**20))
    page.set_input_files("input[type=file]", large)
    playwright.expect(notice).to_contain_text("size", timeout=LONG)
    page.get_by_test_id("toast-close").click()
    page.get_by_label("Question").fill("What is <image>, and <image>?")
    page.keyboard.press("Enter")
    playwright.expect(notice).to_contain_text("<image>", timeout=LONG)
    assert page.get_by_label("Question").input_value() == "What is <image>, and <image>?"  # nothing is lost
    upload(page, picture("coffee.jpg"))
    asked = Request(text="Is there a cup in the picture?", images=[picture("coffee.jpg")])
    assert ask(page, asked.text) == finish(engine.stream(asked)).text


@in_browser
def test_two_visitors_have_their_own_pictures_and_conversations(visit, engine, tmp_path):
    names = {"scene-1.jpg": "What color is the circle?", "scene-2.jpg": "What color is the star?"}
    pages = {name: visit() for name in names}
    for name, page in pages.items():
        upload(page, picture(name))
        page.get_by_label("Question").fill(names[name])
    for page in pages.values():
        page.keyboard.press("Enter")  # both wait at the same time
    for name, page in pages.items():
        playwright.expect(page.get_by_test_id("bot")).to_contain_text("visual tokens", timeout=LONG)
        answer = finish(engine.stream(Request(text=names[name], images=[picture(name)])))
        assert page.get_by_test_id("bot").inner_text().split("\n")[0] == answer.text
        assert page.get_by_test_id("user").count() == 1
    shown = [page.locator("svg.view image").first.get_attribute("href") for page in pages.values()]
    assert shown[0] not in pages["scene-2.jpg"].content() and shown[1] not in pages["scene-1.jpg"].content()
    third = visit()
    assert not any(one in third.content() for one in shown) and third.get_by_test_id("bot").count() == 0


@in_browser
def test_nothing_stays_on_disk(server, browser):
    assert list(server.folder.glob("llava-demo-*"))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    left = list(server.folder.rglob("*"))
    assert [one for one in left if one.is_file() or one.name.startswith("llava-demo")] == []


# Without a browser


def demo_of(engine, reducer=None):
    from llava.serve.demo.page import Demo

    return Demo(engine, "a model", Path("nowhere"), reducer)


class Server:
    """An engine that is no model of ours: it repeats what it is asked, word by word."""

    def stream(self, request):
        self.request = request
        for word in request.messages[-1]["content"].split():
            yield word + " "
        return Answer(0, request.messages[-1]["content"], (7,))


def test_a_server_answers_but_does_not_tell_what_it_kept():
    from llava.serve.demo.page import Session

    server = Server()
    demo = demo_of(server, "topk(tokens=9)")
    session = Session(load_image(picture("coffee.jpg")))
    page = demo.look(session, demo.method, demo.tokens)
    assert "<svg" not in page and "does not tell" in page
    *pieces, last = demo.ask(session, "a b c", demo.method, demo.tokens)
    assert [one[1][-1]["content"] for one in pieces] == ["a ", "a b ", "a b c "]
    assert last[0].messages == [
        {"role": "user", "content": "a b c"},
        {"role": "assistant", "content": "a b c"},
    ]
    assert server.request.reducer == "topk(tokens=9)" and server.request.images == [session.picture]


def test_a_picture_in_tiles_is_shown_tile_by_tile(tmp_path):
    from llava.serve.demo.page import Session

    tiny = family(tmp_path / "tiny")
    edit_json(
        tiny.full / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 112], [112, 112]]
    )
    engine = ModelSource(str(tiny.full), conv_mode="vicuna_v1", device="cpu", reducer="topk(tokens=4)").load()
    demo = demo_of(engine)
    page = demo.look(Session(load_image(picture("coffee.jpg"))), demo.method, demo.tokens)
    assert page.count('<svg class="view"') == 5 and 'data-tokens="20"' in page and "--across: 2" in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "llava mini prepare"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--model-path", "x"], "--model-path"),
        (["--model-path", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(flags, words, tmp_path, monkeypatch):
    from llava.serve import demo

    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(UserError, match=words):
        demo.run(parser.parse_args(flags))
