"""Prompt templates against the reference's, and what LLaVA's users do with a Conversation."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llava.conversation import SeparatorStyle, conv_mode_for, conv_templates, default_conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
CHAT_TEMPLATES = {
    # name: Jinja template, system prompt, the first token that the tokenizer puts
    "mistral_instruct": (MISTRAL, "", "<s>"),
    "qwen_2": (CHATML, "You are a helpful assistant.", ""),
    "smollm2": (CHATML, "You are a helpful AI assistant named SmolLM, trained by Hugging Face", ""),
    "llama_3": (
        LLAMA_3,
        "You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        "<|begin_of_text|>",
    ),
}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))


def test_templates_are_the_references(text_data):
    expected = json.loads((text_data / "templates.json").read_text())
    assert set(expected) | set(CHAT_TEMPLATES) - {"mistral_instruct"} == set(conv_templates)
    for name, fields in expected.items():
        template = conv_templates[name]
        ours = vars(template) | {"sep_style": template.sep_style.name, "roles": list(template.roles)}
        assert ours == fields, name


def test_prompts_are_the_references(text_data):
    for case in json.loads((text_data / "conv_prompts.json").read_text()):
        conversation = conv_templates[case["template"]].copy()
        for i, message in enumerate(case["messages"]):
            if isinstance(message, list):
                message = (message[1], "a picture", "Pad")
            conversation.append_message(conversation.roles[i % 2], message)
        if case.get("error") == "TypeError":
            with pytest.raises(TypeError):
                conversation.get_prompt()
            continue
        assert conversation.get_prompt() == case["prompt"], case["kind"]


@pytest.mark.parametrize("questions", [1, 2])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_prompts_are_those_of_the_language_models_chat_template(name, questions):
    """Against transformers' renderer and the Jinja template; a first token is left to the tokenizer."""
    jinja, system, first = CHAT_TEMPLATES[name]
    texts = ["<image>\nWhat is it?", "A cat.", "Sure?", "Yes."][: 2 * questions - 1]
    conversation = conv_templates[name].copy()
    for i, text in enumerate([*texts, None]):
        conversation.append_message(conversation.roles[i % 2], text)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    expected = TOKENIZER.apply_chat_template(
        messages, chat_template=jinja, tokenize=False, add_generation_prompt=True
    )
    assert first + conversation.get_prompt() == expected


def test_default_conversation_is_vicuna_v1():
    assert default_conversation is conv_templates["vicuna_v1"]
    assert default_conversation.sep_style is SeparatorStyle.TWO


def test_a_copy_shares_no_turns():
    first = conv_templates["vicuna_v1"].copy()
    first.append_message(first.roles[0], "one")
    second = first.copy()
    second.messages[0][1] = "changed"
    second.append_message(second.roles[1], None)
    assert first.messages == [["USER", "one"]]
    assert conv_templates["vicuna_v1"].messages == []


def test_an_empty_answer_is_an_open_turn():
    prompts = set()
    for answer in ("", None):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message("USER", "hi")
        conversation.append_message("ASSISTANT", answer)
        prompts.add(conversation.get_prompt())
    assert prompts == {default_conversation.system + " USER: hi ASSISTANT:"}


@pytest.mark.parametrize("first", [("ASSISTANT", "hello"), ("USER", ""), ("USER", None)])
def test_llama_2_refuses_a_first_turn_without_a_question(first):
    conversation = conv_templates["llava_llama_2"].copy()
    conversation.append_message(*first)
    with pytest.raises(ValueError, match="USER"):
        conversation.get_prompt()


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
        ("llava-next-qwen2-7b", "qwen_2"),
        ("llama3-llava-next-8b", "llama_3"),
        ("mini-lora", "smollm2"),
        ("SmolLM2-135M-Instruct", "smollm2"),
    ],
)
def test_template_by_model_name(name, mode):
    assert conv_mode_for(name) == mode
    assert mode in conv_templates
