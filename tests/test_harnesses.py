"""The calls public evaluation harnesses make, in their order and with their arguments (docs/harnesses.md).

The harnesses need not be here; scripts/lmms_eval_check.py runs lmms-eval itself.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import Family

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model

QUESTIONS = ["What?", "Is there a cat in it, or two?", "Why"]
LENGTH = 6


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    noise[1, :, 35:] = 90  # adaptive reducers keep another number of tokens here
    return [Image.fromarray(one) for one in noise]


@pytest.fixture(scope="module", params=["none", "prumerge+"])
def loaded(tiny_once: Family, request: pytest.FixtureRequest):
    return load_pretrained_model(tiny_once.full, device="cpu", reducer=request.param)


def prompt_of(question: str) -> str:
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


@pytest.fixture(scope="module")
def expected(loaded, images: list[Image.Image]) -> list[str]:
    """One question at a time, the plainest way there is."""
    tokenizer, model, processor, _ = loaded
    answers = []
    for question, image in zip(QUESTIONS, images, strict=True):
        ids = tokenizer_image_token(prompt_of(question), tokenizer, return_tensors="pt")[None]
        pixels = process_images([image], processor, model.config).half()
        new = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=LENGTH)
        answers.append(tokenizer.decode(new[0], skip_special_tokens=True))
    return answers


def test_lmms_eval(tiny, loaded, images, expected):
    """A batch padded on the right with the pad token, its mask `ids != pad`; pixels in float16 on a CPU."""
    tokenizer, model, processor, max_length = load_pretrained_model(
        str(tiny.full),
        None,
        get_model_name_from_path(str(tiny.full)),
        device_map="auto",
        multimodal=True,
        attn_implementation="sdpa",
        reducer=loaded[1].reducer.spec,
    )
    model.eval()
    model.tie_weights()
    model.to(torch.device("cpu"))
    assert max_length == 2048
    pixels = process_images(images, processor, model.config).to(dtype=torch.float16, device="cpu")
    prompts = [
        tokenizer_image_token(prompt_of(question), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        for question in QUESTIONS
    ]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=tokenizer.pad_token_id)
    new = model.generate(
        ids,
        attention_mask=ids.ne(tokenizer.pad_token_id),
        pad_token_id=tokenizer.pad_token_id,
        images=pixels,
        image_sizes=[image.size for image in images],
        do_sample=False,
        temperature=0,
        top_p=None,
        num_beams=1,
        max_new_tokens=LENGTH,
        use_cache=True,
    )
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == expected

    labels = prompts[0].clone()[None]
    labels[:, :20] = -100
    with torch.inference_mode():
        outputs = model(
            input_ids=prompts[0][None],
            labels=labels,
            images=pixels[:1],
            use_cache=True,
            image_sizes=[list(images[0].size)],
        )
    (visual,) = model.encode_images(pixels[:1])
    assert outputs["loss"].isfinite()
    assert outputs["logits"].shape[1] == len(prompts[0]) - 1 + len(visual)


def test_vlmevalkit(tiny, loaded, images, expected):
    """Loads to the CPU by keyword, passes an object with one field for a config, and a stopping criterion
    that counts from the prompt."""
    tokenizer, model, processor, _ = load_pretrained_model(
        model_path=str(tiny.full), model_base=None, model_name="llava-tiny", device="cpu", device_map="cpu"
    )
    model.set_reducer(loaded[1].reducer.spec)
    config = SimpleNamespace(image_aspect_ratio="pad")
    stop = conv_templates["vicuna_v1"].sep2
    assert conv_templates["vicuna_v1"].sep_style == SeparatorStyle.TWO and stop == "</s>"
    for question, image, answer in zip(QUESTIONS, images, expected, strict=True):
        pixels = process_images([image], processor, config).to("cpu", dtype=torch.float16)
        ids = tokenizer_image_token(prompt_of(question), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        ids = ids.unsqueeze(0)
        criteria = [KeywordsStoppingCriteria([stop], tokenizer, ids)]
        with torch.inference_mode():
            new = model.generate(
                ids,
                images=pixels,
                stopping_criteria=criteria,
                do_sample=False,
                temperature=0,
                max_new_tokens=LENGTH,
                top_p=None,
                num_beams=1,
                use_cache=True,
            )
        assert tokenizer.batch_decode(new, skip_special_tokens=True)[0] == answer
