"""The demo's page: what it holds, and what happens when a visitor does something."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from llava.engine import Answer, Engine, LocalEngine, Request, finish
from llava.errors import UserError
from llava.mm_utils import load_image
from llava.pictures import squares, tiles_across
from llava.reducers import ReducerSpecError, available_reducers, build_reducer
from llava.serve.demo import drawing

HERE = Path(__file__).parent
DENSE = "none"
LONGEST_SIDE = 2048
"""Pixels; larger pictures are scaled down as they come in: many sessions hold one in memory."""
UPLOAD_LIMIT = "10mb"
WAITING = 16  # visitors in line
SESSIONS = 100  # in memory; the one that was used least lately goes first
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str
    took: str


@dataclass(frozen=True)
class Session:
    """What one visitor has before them, in memory alone."""

    picture: Image.Image | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as a model reads it."""
        return _messages((turn.question, turn.answer) for turn in self.turns)

    @property
    def shown(self) -> list[dict[str, str]]:
        """The conversation as the page shows it."""
        return _messages((turn.question, f"{turn.answer}\n\n{turn.took}") for turn in self.turns)


def _messages(pairs: Any) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


@contextmanager
def notices() -> Iterator[None]:
    """What is wrong with the input becomes a notice in the page, which stays as it is."""
    try:
        yield
    except UserError as error:
        # A notice is HTML.
        raise gr.Error(escape(str(error)), title="That did not work", print_exception=False) from error


def spec_of(method: str, tokens: int) -> str:
    """The reducer of the two controls: `tokens` bounds a method that finds a number itself."""
    if method == DENSE or not {"(", ":"}.isdisjoint(method):  # a whole spec, the one the page began with
        return method
    fixed = {"max_tokens", "tokens"} & set(vars(build_reducer(method)))
    return f"{method}({min(fixed)}={int(tokens)})" if fixed else method


class Demo:
    """The page over an engine.

    Args:
        name: what the page calls the model.
        examples: a folder of pictures whose questions.json maps their names to questions.
        reducer: what it begins with where the engine does not tell; PruMerge+ instead of every token.
    """

    def __init__(self, engine: Engine, name: str, examples: Path, reducer: str | None):
        self.engine, self.name = engine, name
        index = examples / "questions.json"
        given = json.loads(index.read_text()) if index.is_file() else {}
        self.examples = [(load_image(examples / file), question) for file, question in given.items()]
        self.patches = 576
        if isinstance(engine, LocalEngine):
            self.patches = engine.model.get_vision_tower().num_patches
            reducer = engine.model.reducer.spec
        quarter = self.patches // 4
        few = f"prumerge+(max_tokens={quarter})"
        try:
            start = build_reducer(few if reducer in (None, DENSE) else reducer)
        except ReducerSpecError as error:
            raise UserError(str(error)) from error
        options = vars(start)
        self.tokens = options.get("max_tokens") or options.get("tokens") or quarter
        whole = spec_of(start.name, self.tokens) != start.spec  # it says more than the two controls can
        self.method = start.spec if whole else start.name
        names = [name for name in available_reducers() if name != DENSE]
        self.methods = [start.spec] * whole + [*names, DENSE]

    # --- what a visitor does ---

    def request(self, session: Session, question: str, spec: str, **options: Any) -> Request:
        # The model's own reducer needs no name, and may lie in a file, which no request may name.
        own = isinstance(self.engine, LocalEngine) and spec == self.engine.model.reducer.spec
        images = [session.picture] if session.picture else []
        options |= {"reducer": None if own else spec, "max_new_tokens": MAX_NEW_TOKENS}
        return Request(text=question, images=images, **options)

    def look(self, session: Session, method: str, tokens: int) -> str:
        """What is kept of the picture, as HTML."""
        if session.picture is None:
            return '<p class="empty">Choose a picture.</p>'
        if not isinstance(self.engine, LocalEngine):
            url = drawing.data_url(session.picture)
            note = "The server that answers does not tell which patches it kept."
            return f'<figure class="kept"><img src="{url}" alt="Your picture"><p>{note}</p></figure>'
        spec = spec_of(method, tokens)
        question = session.turns[-1].question if session.turns else ""
        if build_reducer(spec).reads_question and not question:
            return f'<p class="empty">{escape(method)} reads the question: ask one to see what it keeps.</p>'
        look = self.engine.look(session.picture, self.request(session, question, spec))
        pictures = squares(look.pixels, self.engine.image_processor)
        across = 1
        if len(pictures) > 1:
            across = tiles_across(look.size, look.pixels, self.engine.model.config)
        return drawing.kept_tokens(look, pictures, across, spec)

    def show(self, session: Session, method: str, tokens: int) -> str:
        with notices():
            return self.look(session, method, tokens)

    def begin(self, picture: Image.Image, question: str = "") -> tuple[Session, list, str, str]:
        """Another picture: session, chat, question, comparison."""
        picture = picture.copy()
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        return Session(picture), [], question, ""

    def upload(self, file: dict[str, Any] | None) -> tuple:
        if file is None:
            return (gr.skip(),) * 4
        with notices():
            return self.begin(load_image(file["path"], exif=True, name=file["orig_name"]))

    def pick(self, event: gr.EventData) -> tuple:
        return self.begin(*self.examples[int(event.index)])

    def ask(self, session: Session, question: str, method: str, tokens: int) -> Iterator[tuple]:
        """The answer piece by piece: session, chat, question, what is kept."""
        spec, question = spec_of(method, tokens), question.strip()
        with notices():
            if session.picture is None or not question:
                raise UserError("Give a picture and a question first.")
            messages = [*session.messages, {"role": "user", "content": question}]
            request = self.request(session, "", spec, messages=messages)
            said = ""
            with closing(self.engine.stream(request)) as pieces:
                while True:
                    try:
                        said += next(pieces)
                    except StopIteration as end:
                        answer: Answer = end.value
                        break
                    yield session, [*session.shown, *_messages([(question, said)])], gr.skip(), gr.skip()
            if answer.problem:
                raise UserError(answer.problem)
        session = replace(session, turns=(*session.turns, Turn(question, answer.text, _took(answer, spec))))
        reads = isinstance(self.engine, LocalEngine) and build_reducer(spec).reads_question
        yield session, session.shown, "", self.show(session, method, tokens) if reads else gr.skip()

    def compare(self, session: Session, question: str, method: str, tokens: int) -> Iterator[str]:
        """The question asked afresh, with every token and with few."""
        spec = spec_of(method, tokens)
        question = question.strip() or (session.turns[-1].question if session.turns else "")
        with notices():
            if session.picture is None or not question or spec == DENSE:
                raise UserError(
                    "To compare, give a picture, a question and a method that keeps fewer tokens."
                )
            names = {"All tokens": DENSE, spec: spec}
            answers: dict[str, Answer | None] = dict.fromkeys(names)
            for name, reducer in names.items():
                yield drawing.side_by_side(question, answers)
                answer = finish(self.engine.stream(self.request(session, question, reducer)))
                if answer.problem:
                    raise UserError(answer.problem)
                answers[name] = answer
            yield drawing.side_by_side(question, answers)

    # --- the page ---

    def page(self) -> gr.Blocks:
        first = self.begin(*self.examples[0]) if self.examples else (Session(), [], "", "")
        # Files on disk are needed for the moment between upload and reading only.
        with gr.Blocks(title="LLaVA-PruMerge", analytics_enabled=False, delete_cache=(20, 20)) as page:
            session = gr.State(Session())
            gr.HTML(HEADER.format(patches=self.patches, name=escape(self.name)))
            with gr.Row(elem_id="columns"):
                with gr.Column(min_width=300, elem_id="asking"):
                    file = gr.Image(
                        sources=["upload", "webcam", "clipboard"],
                        label="Your picture",
                        height=150,
                        buttons=[],
                        placeholder="Drop or choose a picture",
                    )
                    examples = gr.HTML(self.example_buttons(), js_on_load=PICK)
                    with gr.Row():
                        method = gr.Dropdown(self.methods, value=self.method, label="Method", min_width=140)
                        tokens = gr.Slider(
                            1,
                            self.patches,
                            self.tokens,
                            step=1,
                            label="Tokens at most",
                            buttons=[],
                            min_width=140,
                        )
                    chat = gr.Chatbot(
                        label="Conversation",
                        height=None,
                        min_height=150,
                        max_height=360,
                        buttons=[],
                        allow_tags=False,
                        group_consecutive_messages=False,
                        placeholder="Ask about the picture.",
                    )
                    question = gr.Textbox(label="Question", max_lines=4, autofocus=False)
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", size="md", min_width=80)
                        compare = gr.Button("Compare with all tokens", size="md", min_width=200)
                with gr.Column(min_width=300, elem_id="seeing"):
                    kept = gr.HTML(
                        self.look(first[0], self.method, self.tokens),
                        js_on_load=(HERE / "tokens.js").read_text(),
                    )
            compared = gr.HTML("", elem_id="compared")
            gr.HTML(FOOTER)

            model: dict[str, Any] = {  # one at a time, whatever is asked for
                "concurrency_id": "model",
                "concurrency_limit": 1,
                "show_progress": "minimal",
                "api_visibility": "private",
            }
            controls: list[Any] = [method, tokens]
            scene: list[Any] = [session, chat, question, compared]
            # Not the initial state: one that was forgotten must not come back as the example.
            page.load(lambda: first, None, scene, queue=False, api_visibility="private")
            # The file as it came: what is wrong with it `load_image` says. The input is then empty again.
            given = file.input(self.upload, file, scene, preprocess=False, show_progress_on=kept, **model)
            given.then(lambda: None, None, file, queue=False, api_visibility="private")
            picked = examples.select(self.pick, None, scene, show_progress_on=kept, **model)
            changes: list[Any] = [given.success, picked.success, method.input, tokens.release]
            for changed in changes:
                changed(self.show, [session, *controls], kept, trigger_mode="always_last", **model)
            gr.on(
                [ask.click, question.submit],
                self.ask,
                [session, question, *controls],
                [session, chat, question, kept],
                show_progress_on=chat,
                **model,
            )
            compare.click(self.compare, [session, question, *controls], compared, **model)
            chat.clear(
                lambda session: replace(session, turns=()),
                session,
                session,
                queue=False,
                api_visibility="private",
            )
        return page.queue(max_size=WAITING, api_open=False)

    def example_buttons(self) -> str:
        """Small pictures to choose from."""
        buttons = []
        for number, (picture, question) in enumerate(self.examples):
            small = picture.copy()
            small.thumbnail((160, 160))
            alt = f"Example {number + 1}: {escape(question)}"
            image = f'<img src="{drawing.data_url(small)}" alt="{alt}">'
            buttons.append(f'<button data-index="{number}" title="{alt}">{image}</button>')
        return f'<div class="examples">{"".join(buttons)}</div>'


def _took(answer: Answer, spec: str) -> str:
    parts = [spec]
    if answer.visual_tokens:
        parts.append(f"{sum(answer.visual_tokens)} visual tokens")
    if took := answer.timing:
        times = {"vision": took.vision_ms, "prefill": took.prefill_ms, "total": took.total_ms}
        parts += [f"{name} {ms:.0f} ms" for name, ms in times.items() if ms]  # a server does not tell all
    return f"<small>{' · '.join(parts)}</small>"


HEADER = """
<header><h1>LLaVA-PruMerge</h1>
<p>Ask about a picture: the model reads its {patches} patches as a few visual tokens, and you see which it
kept and where the rest went.</p><p class="model">{name}</p></header>"""

FOOTER = f"""
<footer>One question is answered at a time, up to {WAITING} wait in line. Files up to {UPLOAD_LIMIT.upper()}.
Nobody else sees your picture and conversation; they stay in memory while the page is open, and the file goes
within a minute.</footer>"""

PICK = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: button.dataset.index });
});"""


def serve(demo: Demo, host: str, port: int) -> None:
    """Answers until the process is interrupted.

    Raises:
        UserError: nothing can listen there.
    """
    page = demo.page()
    try:
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=UPLOAD_LIMIT,
            state_session_capacity=SESSIONS,
            theme=theme(),
            css_paths=HERE / "page.css",
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: choose another --port or --host.") from error
    print(f"http://{host}:{port}", flush=True)
    page.block_thread()


def theme() -> gr.themes.Base:
    """Fonts that every system has, warm greys and one accent."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", font=sans, font_mono=mono, radius_size="lg"
    )
    return base.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
