"""Prompt templates against the reference's, and what LLaVA's users do with a Conversation."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from llava.conversation import SeparatorStyle, conv_mode_for, conv_templates, default_conversation


def test_templates_are_the_references(text_data: Path) -> None:
    expected = json.loads((text_data / "templates.json").read_text())
    assert set(expected) | {"smollm2"} == set(conv_templates)
    for name, fields in expected.items():
        template = conv_templates[name]
        ours = vars(template) | {"sep_style": template.sep_style.name, "roles": list(template.roles)}
        assert ours == fields | {"skip_next": False}, name


def test_prompts_are_the_references(text_data: Path) -> None:
    for case in json.loads((text_data / "conv_prompts.json").read_text()):
        conversation = conv_templates[case["template"]].copy()
        for i, message in enumerate(case["messages"]):
            if isinstance(message, list):
                message = (message[1], Image.new("RGB", (50, 40)), "Pad")
            conversation.append_message(conversation.roles[i % 2], message)
        if case.get("error") == "TypeError":
            with pytest.raises(TypeError):
                conversation.get_prompt()
            continue
        assert conversation.get_prompt() == case["prompt"], case["kind"]
        assert len(conversation.get_images()) == case["n_images"]


def test_smollm2_prompt_is_its_chat_template() -> None:
    conversation = conv_templates["smollm2"].copy()
    for i, text in enumerate(["<image>\nWhat is it?", "A cat.", "Sure?", None]):
        conversation.append_message(conversation.roles[i % 2], text)
    assert conversation.get_prompt() == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_default_conversation_is_vicuna_v1() -> None:
    assert default_conversation is conv_templates["vicuna_v1"]
    assert default_conversation.sep_style is SeparatorStyle.TWO


def test_a_copy_shares_no_turns() -> None:
    first = conv_templates["vicuna_v1"].copy()
    first.append_message(first.roles[0], "one")
    second = first.copy()
    second.messages[0][1] = "changed"
    second.append_message(second.roles[1], None)
    assert first.messages == [["USER", "one"]]
    assert conv_templates["vicuna_v1"].messages == []


def test_an_empty_answer_is_an_open_turn() -> None:
    prompts = set()
    for answer in ("", None):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message("USER", "hi")
        conversation.append_message("ASSISTANT", answer)
        prompts.add(conversation.get_prompt())
    assert prompts == {default_conversation.system + " USER: hi ASSISTANT:"}


@pytest.mark.parametrize("first", [("ASSISTANT", "hello"), ("USER", ""), ("USER", None)])
def test_llama_2_refuses_a_first_turn_without_a_question(first: tuple[str, str | None]) -> None:
    conversation = conv_templates["llava_llama_2"].copy()
    conversation.append_message(*first)
    with pytest.raises(ValueError, match="begins with a turn of USER"):
        conversation.get_prompt()


def test_picture_sizes_are_the_references(text_data: Path) -> None:
    for case in json.loads((text_data / "helpers.json").read_text())["gradio_process_image"]:
        conversation = conv_templates["vicuna_v1"].copy()
        picture = Image.new("RGB", tuple(case["size"]), (1, 2, 3))
        conversation.append_message("USER", ("what?", picture, case["mode"]))
        (image,) = conversation.get_images(return_pil=True)
        assert list(image.size) == case["out"], case


def test_pictures_as_text_decode_to_themselves() -> None:
    conversation = conv_templates["vicuna_v1"].copy()
    picture = Image.effect_noise((30, 20), 50).convert("RGB")
    conversation.append_message("USER", ("look <image>", picture, "Default"))
    conversation.append_message("ASSISTANT", None)
    (encoded,) = conversation.get_images()
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).tobytes() == picture.tobytes()
    with pytest.raises(ValueError, match="image mode"):
        conversation.messages[0][1] = ("look", picture, "Stretch")
        conversation.get_images()


def test_chat_page_rows_and_log() -> None:
    conversation = conv_templates["v0"].copy()  # two example turns, which a page does not show
    conversation.append_message("Human", ("<image>\nwhat?", Image.new("RGB", (9, 9)), "Default"))
    conversation.append_message("Assistant", "black")
    conversation.append_message("Human", "sure?")
    conversation.append_message("Assistant", None)
    rows = conversation.to_gradio_chatbot()
    assert [row["role"] for row in rows] == ["user", "assistant", "user"]
    assert rows[0]["content"].startswith('<img src="data:image/jpeg;base64,')
    assert rows[0]["content"].endswith(">what?")
    assert [row["content"] for row in rows[1:]] == ["black", "sure?"]
    logged = json.loads(json.dumps(conversation.dict()))
    assert logged["messages"][2:] == [["Human", "<image>\nwhat?"], ["Assistant", "black"], ["Human", "sure?"],
                                      ["Assistant", None]]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("LLaVA-V1.5-13b-LoRA", "llava_v1"),
        ("llava-prumerge-vicuna-7b-v1.5-lora", "llava_v1"),
        ("llava-llama-2-13b-chat-v1", "llava_llama_2"),  # llama-2 is looked for before v1
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-mpt-7b", "mpt"),
        ("llava-7b", "llava_v0"),
        ("mini-lora", "smollm2"),
        ("SmolLM2-135M-Instruct", "smollm2"),
    ],
)
def test_template_by_model_name(name: str, mode: str) -> None:
    assert conv_mode_for(name) == mode
    assert mode in conv_templates
