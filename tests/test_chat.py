"""`llava chat` and its session: answers of a plain generate call, pictures encoded once, slips forgiven."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoints import (
    HIDDEN,
    IMAGE_SIZE,
    VISUAL_TOKENS,
    Family,
    edit_json,
    family,
    single_safetensors,
    write_json,
)
from transformers import AutoTokenizer

from llava import cli
from llava.conversation import conv_templates, default_conv_mode
from llava.errors import UserError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.model.checkpoints import inspect_checkpoint, read_model_weights
from llava.serve import chat
from llava.serve import cli as llava_cli
from llava.serve.session import ChatSession, _Stream

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
def loaded(tiny: Family):
    return load_pretrained_model(tiny.full, device="cpu")[:3]


@pytest.fixture
def session(loaded) -> ChatSession:
    model = loaded[1]
    model.set_reducer("none")
    return ChatSession(model, loaded[0], loaded[2], "vicuna_v1")


@pytest.fixture
def images(pictures: list[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in pictures]


@torch.inference_mode()
def plain_answer(session: ChatSession, prompt: str, images: list[Image.Image]) -> str:
    """As a program that knows LLaVA asks: pixels in, ids out."""
    ids = tokenizer_image_token(prompt, session.tokenizer, return_tensors="pt")[None]
    pixels = process_images(images, session.image_processor, session.model.config)
    new = session.model.generate(
        ids,
        images=pixels,
        image_sizes=[image.size for image in images],
        do_sample=False,
        max_new_tokens=LENGTH,
    )
    return session.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def prompt_of(*turns: str | None, template: str = "vicuna_v1") -> str:
    conversation = conv_templates[template].copy()
    for index, turn in enumerate(turns):
        conversation.append_message(conversation.roles[index % 2], turn)
    return conversation.get_prompt()


# The session


@pytest.mark.parametrize("reducer", ["none", "prumerge+", "pool(tokens=4)"])
def test_turns_answer_like_plain_calls(session: ChatSession, images, reducer: str, monkeypatch) -> None:
    session.use_reducer(reducer)
    session.look_at(images)
    expected = session.model.encode_images(
        process_images(images, session.image_processor, session.model.config)
    )

    def no_more(*_) -> None:
        raise AssertionError("the pictures were encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(session.model, "encode_images", no_more)
        first = session.ask("What is it?", max_new_tokens=LENGTH)
        second = session.ask("And why?", max_new_tokens=LENGTH)
    question = "<image>\n<image>\nWhat is it?"
    assert first.text == plain_answer(session, prompt_of(question, None), images)
    assert second.text == plain_answer(session, prompt_of(question, first.text, "And why?", None), images)
    assert first.text and first.new_tokens <= LENGTH
    assert first.visual_tokens == second.visual_tokens == tuple(len(tokens) for tokens in expected)
    assert first.vision_ms > 0 and second.vision_ms == 0
    assert 0 < first.prefill_ms <= first.total_ms - first.vision_ms


def test_text_alone(session: ChatSession) -> None:
    reply = session.ask("Hello", max_new_tokens=LENGTH)
    assert reply.text == plain_answer(session, prompt_of("Hello", None), [])
    assert reply.visual_tokens == ()


def test_tiles_are_joined_once_for_all_turns(tiny: Family, tmp_path: Path, images) -> None:
    path = shutil.copytree(tiny.full, tmp_path / "anyres")
    weights = read_model_weights(inspect_checkpoint(path)).tensors
    newline = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))
    weights = {name: tensor.clone() for name, tensor in weights.items()} | {"model.image_newline": newline}
    for file in path.glob("pytorch_model*"):
        file.unlink()
    single_safetensors(path, weights)
    edit_json(
        path / "config.json",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]],
        mm_vision_tower=str(tiny.tower),
    )
    tokenizer, model, processor, _ = load_pretrained_model(path, device="cpu")
    session = ChatSession(model, tokenizer, processor, "vicuna_v1")
    session.look_at(images)
    assert min(session.visual_tokens) > VISUAL_TOKENS  # a small copy, and tiles with their newlines
    first = session.ask("One?", max_new_tokens=LENGTH)
    second = session.ask("Two?", max_new_tokens=LENGTH)
    question = "<image>\n<image>\nOne?"
    assert first.text == plain_answer(session, prompt_of(question, None), images)
    assert second.text == plain_answer(session, prompt_of(question, first.text, "Two?", None), images)


def test_where_pictures_go(session: ChatSession, images, monkeypatch: pytest.MonkeyPatch) -> None:
    session.look_at(images)
    assert session.question("Which?") == "<image>\n<image>\nWhich?"
    assert session.question("Is <image> or <image> older?") == "Is <image> or <image> older?"
    monkeypatch.setattr(session.model.config, "mm_use_im_start_end", True)
    assert (
        session.question("a <image> b <image>") == "a <im_start><image><im_end> b <im_start><image><im_end>"
    )
    assert session.question("Which?") == "<im_start><image><im_end>\n" * 2 + "Which?"


@pytest.mark.parametrize(
    ("text", "says"), [("<image> <image> <image>", "3 <image>"), ("<image>", "1 <image>")]
)
def test_a_slip_leaves_the_conversation_as_it_was(session: ChatSession, images, text: str, says: str) -> None:
    session.look_at(images)
    session.ask("One?", max_new_tokens=2)
    session.reset()
    with pytest.raises(UserError, match=f"{says} but there are 2 pictures"):
        session.ask(text)
    assert session.conversation.messages == []
    reply = session.ask("Two?", max_new_tokens=LENGTH)
    assert reply.text == plain_answer(session, prompt_of("<image>\n<image>\nTwo?", None), images)
    with pytest.raises(UserError, match="first turn"):
        session.ask("and this <image>?")
    assert len(session.conversation.messages) == 2


def test_a_reducer_that_cannot_be_leaves_the_one_before(session: ChatSession, images, monkeypatch) -> None:
    session.use_reducer("grid(tokens=4)")
    session.look_at(images[:1])
    with pytest.raises(UserError, match="prumerge"):
        session.use_reducer("prumerg")

    def fails(*_) -> None:
        raise UserError("this tower has no CLS token")

    with monkeypatch.context() as patch:
        patch.setattr(session.model, "embed_images", fails)
        with pytest.raises(UserError, match="CLS"):
            session.use_reducer("prumerge")
    assert session.model.reducer.spec == "grid(tokens=4)"
    assert session.visual_tokens == (4,)


def test_the_context_bounds_an_answer(session: ChatSession, images, monkeypatch: pytest.MonkeyPatch) -> None:
    session.look_at(images)
    prompt = prompt_of("<image>\n<image>\nWhat is it?", None)
    length = len(tokenizer_image_token(prompt, session.tokenizer)) - 2 + 2 * VISUAL_TOKENS
    config = session.model.config
    monkeypatch.setattr(session.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(config, "max_position_embeddings", length + 5)
    assert session.ask("What is it?").new_tokens == 5
    session.reset()
    monkeypatch.setattr(config, "max_position_embeddings", length)
    with pytest.raises(UserError, match=f"{length} tokens long and the model reads at most {length - 1}"):
        session.ask("What is it?")
    monkeypatch.setattr(config, "max_position_embeddings", 4096)
    monkeypatch.setattr(config, "tokenizer_model_max_length", length - 1)
    with pytest.raises(UserError, match="/reset"):
        session.ask("What is it?")


def test_no_such_template(loaded) -> None:
    with pytest.raises(UserError, match=r"no conversation template 'vicuna'.*vicuna_v1"):
        ChatSession(loaded[1], loaded[0], loaded[2], "vicuna")


# The stream


@pytest.mark.parametrize("stop", ["###", None])
def test_pieces_are_the_answer(session: ChatSession, stop: str | None) -> None:
    """Byte by byte, with a stop string that is begun twice before it comes."""
    text = "  Ein Käse – 茶 # or ## no.  "
    tokenizer = session.tokenizer
    ids = tokenizer(f"{text}{stop or ''}</s>", add_special_tokens=False).input_ids
    pieces: list[str] = []
    stream = _Stream(tokenizer, stop, pieces.append)
    stream.put(torch.empty(1, 0, dtype=torch.long))  # what generate calls the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
        assert "\ufffd" not in "".join(pieces)
        assert text.strip().startswith("".join(pieces))
    assert len(pieces) > 10
    stream.end()
    assert "".join(pieces) == stream.text == text.strip()


def test_an_answer_ends_at_the_stop_string(session: ChatSession, images) -> None:
    """A template whose turns end with text: what the model says after it is not asked for."""
    session.look_at(images[:1])
    free = plain_answer(session, prompt_of("<image>\nHi", None, template="llava_v0"), images[:1])
    middle = free[len(free) // 2]
    stopping = ChatSession(session.model, session.tokenizer, session.image_processor, "llava_v0")
    stopping.look_at(images[:1])
    stopping.conversation.sep = middle  # now any answer meets it
    expected = plain_answer(
        session, stopping.conversation.system + middle + f"Human: <image>\nHi{middle}Assistant:", images[:1]
    )
    pieces: list[str] = []
    reply = stopping.ask("Hi", max_new_tokens=LENGTH, emit=pieces.append)
    assert reply.text == "".join(pieces) == expected.split(middle)[0].strip()


# Templates


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "vicuna_v1"),
        ("my-run", "vicuna_v1"),
        ("mini-lora", "smollm2"),
        ("llava-mpt-7b", "mpt"),
    ],
)
def test_default_template_by_name(loaded, name: str, mode: str) -> None:
    assert default_conv_mode(name, loaded[0]) == mode


def test_default_template_by_tokenizer(root: Path) -> None:
    """A run of ours under any name: its tokenizer knows."""
    base = root / "checkpoints/mini-base"
    if not base.is_dir():
        pytest.skip("checkpoints/mini-base is not built (llava mini prepare)")
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


def test_one_question(tiny: Family, session: ChatSession, pictures, images, capsys) -> None:
    files = ", ".join(map(str, pictures))
    status, out, err = ask(tiny, "--image-file", files, "--query", "What is it?", capsys=capsys)
    answer = plain_answer(session, prompt_of("<image>\n<image>\nWhat is it?", None), images)
    assert (status, out) == (0, answer + "\n")
    assert f"({VISUAL_TOKENS} + {VISUAL_TOKENS} visual tokens; vision " in err


def test_a_conversation(tiny: Family, session: ChatSession, pictures, images, capsys, monkeypatch) -> None:
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
    session.model.set_reducer("grid(tokens=4)")
    answers += [plain_answer(session, what, both), plain_answer(session, what, one)]
    answers += [plain_answer(session, prompt_of("<image>\nHi", None), one)]
    assert (status, out) == (0, "".join(answer + "\n" for answer in answers))
    assert err.count("(new conversation: 4 visual tokens, reducer grid(tokens=4))") == 3
    for slip in ("did you mean 'grid'", "nowhere.png: no such image", "2 <image>", "no command /rest"):
        assert slip in err


def test_ctrl_c_stops_the_answer_only(session: ChatSession, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ChatSession.ask, []

    def interrupted(self, text: str, **options):
        calls.append(text)
        if len(calls) == 1:
            options["emit"]("Once upon")
            raise KeyboardInterrupt
        return real(self, text, **options)

    monkeypatch.setattr(ChatSession, "ask", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell me\nHi\n"))
    assert chat.converse(session, {"max_new_tokens": LENGTH}, exif=False) == 0
    out, err = capsys.readouterr()
    assert out == f"Once upon\n{plain_answer(session, prompt_of('Hi', None), [])}\n"
    assert "stopped" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0: give 1 or more."),
        (["--temperature", "-1"], "--temperature -1.0: give 0"),
        (["--top-p", "0"], "--top-p 0.0: give more than 0"),
        (["--conv-mode", "vicuna"], "no conversation template 'vicuna'"),
        (["--dtype", "float12"], "float12"),
        (["--device", "gpu"], "gpu"),
    ],
)
def test_flags_out_of_range(tiny: Family, flags: list[str], says: str, capsys) -> None:
    status, out, err = ask(tiny, "--query", "Hi", *flags, capsys=capsys)
    assert (status, out) == (2, "")
    assert says in err and "Traceback" not in err


def test_a_language_model_cannot_see(tiny: Family, capsys) -> None:
    status = cli.main(["chat", "--model-path", str(tiny.base), "--device", "cpu", "--query", "Hi"])
    assert status == 2
    assert "without vision" in capsys.readouterr().err


def test_the_old_name(tiny: Family, session: ChatSession, pictures, images, capsys, monkeypatch) -> None:
    """LLaVA's flags; the template is the one its demo infers from the directory's name."""
    flags = ["--model-path", str(tiny.full), "--image-file", str(pictures[0]), "--device", "cpu"]
    flags += ["--max-new-tokens", str(LENGTH), "--temperature", "0"]
    question = "Say it"
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    assert llava_cli.main(flags) == 0
    prompt = prompt_of(f"<image>\n{question}", None, template="llava_v0")  # "llava-tiny" names no version
    assert capsys.readouterr().out == plain_answer(session, prompt, images[:1]).split("###")[0].strip() + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(("reducer", "tokens"), [("none", 576), ("prumerge+", None)])
def test_the_shipped_model(root: Path, reducer: str, tokens: int | None, capsys, monkeypatch) -> None:
    if not (root / "checkpoints/mini-lora").is_dir() or not (root / "checkpoints/mini-base").is_dir():
        pytest.skip("the small model is not built (llava mini prepare)")
    monkeypatch.chdir(root)
    flags = ["--model-path", "checkpoints/mini-lora", "--model-base", "checkpoints/mini-base"]
    flags += [
        "--image-file",
        "playground/pictures/chelsea.jpg",
        "--reducer",
        reducer,
        "--max-new-tokens",
        "8",
    ]
    assert cli.main(["chat", *flags, "--device", "cpu", "--query", "Is there a cat?"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    seen = int(err.split(" visual tokens")[0].split("(")[-1])
    assert seen == tokens if tokens else 20 < seen < 576
