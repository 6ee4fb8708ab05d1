"""`llava chat`: answers of a plain generate call, pictures encoded once, slips forgiven."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_video import write_video
from tiny_checkpoints import VISUAL_TOKENS, Family, family, write_json
from transformers import AutoTokenizer

from llava import cli
from llava.conversation import conv_templates, default_conv_mode
from llava.engine import LocalEngine, ModelSource
from llava.errors import UserError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.serve import chat
from llava.serve import cli as llava_cli
from llava.serve.chat import Chat

LENGTH = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Family:
    tiny = family(tmp_path_factory.mktemp("chat"))
    # Random weights would say bytes that are no text.
    write_json(tiny.full / "generation_config.json", {"suppress_tokens": list(range(3, 259))})
    return tiny


@pytest.fixture(scope="module")
def pictures(tiny: Family) -> list[Path]:
    """Two files; half of the first is grey, so that adaptive reducers keep different numbers of tokens."""
    generator = torch.Generator().manual_seed(3)
    paths = []
    for index, size in enumerate([(80, 60), (50, 90)]):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        if index == 0:
            noise[:, : size[0] // 2] = 128
        paths.append(tiny.root / f"picture-{index}.png")
        Image.fromarray(noise.numpy()).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def loaded(tiny: Family) -> LocalEngine:
    return ModelSource(str(tiny.full), conv_mode="vicuna_v1", device="cpu").load()


@pytest.fixture
def session(loaded: LocalEngine) -> Chat:
    loaded.model.set_reducer("none")
    return Chat(loaded, {"max_new_tokens": LENGTH})


def ask_quietly(session: Chat, text: str):
    return session.ask(text, lambda piece: None)


@pytest.fixture
def images(pictures: list[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in pictures]


@torch.inference_mode()
def plain_answer(session: Chat, prompt: str, images: list[Image.Image]) -> str:
    """As a program that knows LLaVA asks: pixels in, ids out."""
    engine = session.engine
    ids = tokenizer_image_token(prompt, engine.tokenizer, return_tensors="pt")[None]
    pixels = process_images(images, engine.image_processor, engine.model.config)
    new = engine.model.generate(
        ids,
        images=pixels,
        image_sizes=[image.size for image in images],
        do_sample=False,
        max_new_tokens=LENGTH,
    )
    return engine.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def prompt_of(*turns: str | None, template: str = "vicuna_v1") -> str:
    conversation = conv_templates[template].copy()
    for index, turn in enumerate(turns):
        conversation.append_message(conversation.roles[index % 2], turn)
    return conversation.get_prompt()


# The conversation


@pytest.mark.parametrize("reducer", ["none", "prumerge+", "pool(tokens=4)"])
def test_turns_answer_like_plain_calls(session, images, reducer, monkeypatch):
    session.use_reducer(reducer)
    session.look_at(images)
    engine = session.engine
    expected = engine.model.encode_images(process_images(images, engine.image_processor, engine.model.config))

    def no_more(*_) -> None:
        raise AssertionError("the pictures were encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "encode_images", no_more)
        first = ask_quietly(session, "What is it?")
        second = ask_quietly(session, "And why?")
    question = "<image>\n<image>\nWhat is it?"
    assert first.text == plain_answer(session, prompt_of(question, None), images)
    assert second.text == plain_answer(session, prompt_of(question, first.text, "And why?", None), images)
    assert first.text and first.timing.new_tokens <= LENGTH
    assert first.visual_tokens == second.visual_tokens == tuple(len(tokens) for tokens in expected)
    assert first.timing.vision_ms > 0 and second.timing.vision_ms == 0
    assert 0 < first.timing.prefill_ms <= first.timing.total_ms - first.timing.vision_ms


@pytest.mark.parametrize("text", ["<image> <image> <image>", "<image>"])
def test_a_slip_leaves_the_conversation_as_it_was(session, images, text):
    session.look_at(images)
    with pytest.raises(UserError, match="2 pictures"):
        ask_quietly(session, text)
    assert session.messages == []
    reply = ask_quietly(session, "Two?")
    assert reply.text == plain_answer(session, prompt_of("<image>\n<image>\nTwo?", None), images)
    with pytest.raises(UserError, match="3 <image>"):
        ask_quietly(session, "and this <image>?")
    assert len(session.messages) == 2


def test_a_reducer_that_does_not_work_leaves_the_one_before(session, images, monkeypatch):
    session.use_reducer("grid(tokens=4)")
    session.look_at(images[:1])

    def fails(*_) -> None:
        raise UserError("this tower has no CLS token")

    with monkeypatch.context() as patch:
        patch.setattr(session.engine.model, "embed_images", fails)
        with pytest.raises(UserError, match="CLS"):
            session.use_reducer("prumerge")
    assert session.engine.model.reducer.spec == "grid(tokens=4)"
    assert [len(block) for block in session.encoded] == [4]


# Templates


def test_default_template_by_name(loaded):
    modes = {"llava-v1.5-7b": "vicuna_v1", "my-run": "vicuna_v1", "llava-mpt-7b": "mpt"}
    assert {name: default_conv_mode(name, loaded.tokenizer) for name in modes} == modes


def test_default_template_by_tokenizer(mini):
    """A run of ours under any name: its tokenizer knows."""
    _, base = mini
    tokenizer = load_tokenizer(base)
    assert default_conv_mode("my-run", tokenizer) == "smollm2"
    conversation = conv_templates["smollm2"].copy()
    conversation.append_message(conversation.roles[0], "Hi")
    conversation.append_message(conversation.roles[1], None)
    theirs = AutoTokenizer.from_pretrained(base).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert conversation.get_prompt() == theirs


# The command


def ask(tiny: Family, *flags: str, capsys) -> tuple[int, str, str]:
    command = ["chat", "--model-path", str(tiny.full), "--device", "cpu", "--max-new-tokens", str(LENGTH)]
    status = cli.main([*command, *flags])
    return status, *capsys.readouterr()


def test_one_question(tiny, session, pictures, images, capsys):
    files = ", ".join(map(str, pictures))
    status, out, err = ask(tiny, "--image-file", files, "--query", "What is it?", capsys=capsys)
    answer = plain_answer(session, prompt_of("<image>\n<image>\nWhat is it?", None), images)
    assert (status, out) == (0, answer + "\n")
    assert f"({VISUAL_TOKENS} + {VISUAL_TOKENS} visual tokens; vision " in err


def test_frames_of_a_video_are_its_pictures(tiny, tmp_path, capsys):
    write_video(tmp_path / "film.mp4", list(range(10, 210, 20)))
    flags = ["--video-file", str(tmp_path / "film.mp4"), "--frames", "3", "--query", "What is it?"]
    status, _, err = ask(tiny, *flags, "--reducer", "topk(tokens=4)", capsys=capsys)
    assert status == 0 and "4 + 4 + 4 visual tokens" in err


def test_a_conversation(tiny, session, pictures, images, capsys, monkeypatch):
    lines = [
        "What is it?",
        "And?",
        "/reducer grid(tokens=4)",
        "What is it?",
        "/reducer gird",
        "/image nowhere.png",
        f"/image {pictures[1]}",
        "<image> <image>",
        "What is it?",
        "/reset",
        "/rest",
        "Hi",
        "",
        "never read",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, out, err = ask(tiny, "--image-file", str(pictures[0]), capsys=capsys)

    both, one = images[:1], images[1:]
    what = prompt_of("<image>\nWhat is it?", None)
    first = plain_answer(session, what, both)
    answers = [first, plain_answer(session, prompt_of("<image>\nWhat is it?", first, "And?", None), both)]
    session.engine.model.set_reducer("grid(tokens=4)")
    answers += [plain_answer(session, what, both), plain_answer(session, what, one)]
    answers += [plain_answer(session, prompt_of("<image>\nHi", None), one)]
    assert (status, out) == (0, "".join(answer + "\n" for answer in answers))
    assert err.count("(new conversation: 4 visual tokens, reducer grid(tokens=4))") == 3
    for slip in ("did you mean 'grid'", "nowhere.png: no such image", "2 <image>", "no command /rest"):
        assert slip in err


def test_ctrl_c_stops_the_answer_only(session, capsys, monkeypatch):
    real, calls = chat.say, []

    def interrupted(piece: str) -> None:
        calls.append(piece)
        real(piece)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "say", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell me\nHi\n"))
    assert chat.converse(session, exif=False) == 0
    out, err = capsys.readouterr()
    assert out == f"{calls[0]}\n{plain_answer(session, prompt_of('Hi', None), [])}\n"
    assert "stopped" in err


@pytest.mark.parametrize("flag", ["--max-new-tokens 0", "--temperature -1", "--top-p 0", "--conv-mode x"])
def test_flags_out_of_range(tiny, flag, capsys):
    status, out, err = ask(tiny, "--query", "Hi", *flag.split(), capsys=capsys)
    assert (status, out) == (2, "") and flag.split()[0] in err


def test_a_language_model_cannot_see(tiny, capsys):
    status = cli.main(["chat", "--model-path", str(tiny.base), "--device", "cpu", "--query", "Hi"])
    assert status == 2
    assert "without vision" in capsys.readouterr().err


def test_the_old_name(tiny, session, pictures, images, capsys, monkeypatch):
    """LLaVA's flags; the template is the one its demo infers from the directory's name."""
    flags = ["--model-path", str(tiny.full), "--image-file", str(pictures[0]), "--device", "cpu"]
    flags += ["--max-new-tokens", str(LENGTH), "--temperature", "0"]
    question = "Say it"
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    assert llava_cli.main(flags) == 0
    prompt = prompt_of(f"<image>\n{question}", None, template="llava_v0")  # "llava-tiny" names no version
    assert capsys.readouterr().out == plain_answer(session, prompt, images[:1]).split("###")[0].strip() + "\n"
