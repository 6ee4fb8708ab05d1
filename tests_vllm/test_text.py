"""Prompts and ids are those of training, whatever the template and the tokenizer."""

import os
import shutil

import jinja2.sandbox
import pytest
from conftest import BASE, LORA
from reference import prompt_of

from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.serve.vllm.template import chat_template, spelled_bos
from llava.serve.vllm.text import LlavaTokenizer
from tests.tiny_checkpoints import family

TURNS = ("<image>\nWhat is this?", 'A "cup".', "  Is it <b>red</b>?\n", "No.\\n", "Why is <image> here?")
PLAIN = [name for name, one in conv_templates.items() if one.sep_style is SeparatorStyle.PLAIN]


def messages(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def render(template: str, **variables) -> str:
    def raise_exception(sentence: str):
        raise ValueError(sentence)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    return environment.from_string(template).render(raise_exception=raise_exception, **variables)


@pytest.mark.parametrize("name", sorted(conv_templates.keys() - set(PLAIN)))
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_a_chat_template_renders_what_the_conversation_template_renders(name, turns):
    texts = TURNS[:turns]
    assert render(chat_template(conv_templates[name]), messages=messages(*texts)) == prompt_of(name, *texts)


def test_a_system_message_replaces_the_templates_own():
    text = render(chat_template(conv_templates["vicuna_v1"]), messages=messages("Hi", system="Be brief."))
    assert text == "Be brief. USER: Hi ASSISTANT:"
    text = render(chat_template(conv_templates["chatml_direct"]), messages=messages("Hi", system="Be brief."))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and "Answer the questions" not in text


def test_turns_out_of_order_are_refused():
    turns = messages("Hi") + messages("again")
    with pytest.raises(ValueError, match="alternate"):
        render(chat_template(conv_templates["vicuna_v1"]), messages=turns)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint as released: model_type "llava", no chat template, a sentencepiece-like tokenizer."""
    return family(tmp_path_factory.mktemp("released")).full


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small model's byte-level tokenizer beside a config of ours. The weights are not read."""
    if not BASE.is_dir():
        pytest.skip("checkpoints/mini-base is missing: `llava mini prepare` builds it")
    folder = tmp_path_factory.mktemp("small") / "mini"
    shutil.copytree(BASE, folder, copy_function=os.symlink, ignore=shutil.ignore_patterns("config.json"))
    shutil.copy(LORA / "config.json", folder)
    return folder


@pytest.mark.parametrize("conv_mode", ["vicuna_v1", "llava_llama_2", "chatml_direct"])
@pytest.mark.parametrize("which", ["released", "small"])
def test_ids_are_those_of_tokenizer_image_token(which, conv_mode, request):
    path = request.getfixturevalue(which)
    plain, served = load_tokenizer(path), LlavaTokenizer.from_pretrained(path)
    image = served.image_token_id
    template = chat_template(conv_templates[conv_mode], bos=spelled_bos(plain))
    for texts in (
        TURNS[:1],
        TURNS,
        ("no picture",),
        ("<image>", "ok", " leading space"),
        ("a<image><image>",),
    ):
        prompt = prompt_of(conv_mode, *texts)
        wanted = tokenizer_image_token(prompt, plain, image_token_index=image)
        assert served(prompt).input_ids == wanted
        chat = served.apply_chat_template(messages(*texts), chat_template=template, tokenize=False)
        assert served(chat, add_special_tokens=False).input_ids == wanted
        assert served.encode(chat, add_special_tokens=False) == wanted
    assert image == len(plain) and served.decode([image]) == "<image>"
