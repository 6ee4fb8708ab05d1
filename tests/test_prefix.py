"""Prompts that go on from a shared beginning give what whole prompts give, one at a time."""

import pytest
import torch
from tiny_checkpoints import TOWER_HIDDEN
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.prefix import Prefix, answer, begin, extend

HEAD = torch.tensor([1, 272, 300, 311, 262])
QUESTIONS = [
    torch.tensor(ids)
    for ids in ([270, 281, 290], [301, 302, 303, 304, 305, 306], [299], [270, 281, 290], [275, 276, 280, 281])
]
ASKED_ABOUT = [0, 0, 1, 2, 1]  # which picture each question is about
LENGTHS = [7, 16, 2]  # visual tokens of these pictures, where they are made up
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def model(tiny_once) -> LlavaLlamaForCausalLM:
    _, model, _, _ = load_pretrained_model(tiny_once.full, None, "any", device="cpu", dtype="float32")
    return model


@pytest.fixture
def visual(model) -> list[Tensor]:
    """Made-up visual tokens of very different number."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, TOWER_HIDDEN, generator=generator) for length in LENGTHS]


def whole(question: Tensor) -> Tensor:
    return torch.cat([HEAD, torch.tensor([IMAGE_TOKEN_INDEX]), question])


def seen(model, visual: list[Tensor]) -> Prefix:
    return extend(model, begin(model, HEAD), model.project(visual), [0] * len(visual))


def one_by_one(model, visual: list[Tensor], **arguments) -> list:
    return [
        model.generate(whole(question)[None], visual_tokens=[visual[picture]], **arguments)
        for question, picture in zip(QUESTIONS, ASKED_ABOUT, strict=True)
    ]


def same(ids: Tensor, reference: Tensor) -> bool:
    """Whether a row of a batch is the reference, and nothing but padding where the batch went on."""
    return ids[: len(reference)].equal(reference) and not ids[len(reference) :].any()


def assert_close(logits: Tensor, reference: Tensor) -> None:
    """Float32's error, of sums in another order: 1e-5 of the largest logit."""
    torch.testing.assert_close(logits, reference, atol=1e-5 * float(reference.abs().max()), rtol=0)


def pixels(count: int) -> Tensor:
    """Half of them strongly uneven, so that adaptive reducers keep different numbers of tokens."""
    noise = torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    noise[::2, :, :28] *= 0.05
    return noise


@pytest.mark.parametrize("reducer", ["none", "prumerge", "prumerge+", "random(tokens=5)"])
def test_answers_and_logits_are_those_of_whole_prompts(model, reducer):
    model.set_reducer(reducer)
    visual = model.encode_images(pixels(3))
    reference = one_by_one(model, visual, **GREEDY, **LOGITS)
    out = answer(model, seen(model, visual), QUESTIONS, ASKED_ABOUT, **GREEDY, **LOGITS)
    for row, one in enumerate(reference):
        assert same(out.sequences[row], one.sequences[0])
        for step, logits in enumerate(one.logits):
            assert_close(out.logits[step][row], logits[0])
    model.set_reducer("none")


def test_beams(model, visual):
    beams = {**GREEDY, "num_beams": 3}
    reference = one_by_one(model, visual, **beams)
    out = answer(model, seen(model, visual), QUESTIONS, ASKED_ABOUT, **beams)
    assert all(same(row, one[0]) for row, one in zip(out, reference, strict=True))


def test_sampling_draws_what_a_batch_of_whole_prompts_draws(model, visual):
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 8, "pad_token_id": 0}
    torch.manual_seed(5)
    reference = model.generate(
        [whole(question) for question in QUESTIONS],
        visual_tokens=[visual[picture] for picture in ASKED_ABOUT],
        **sampling,
    )
    prefix = seen(model, visual)
    torch.manual_seed(5)
    assert answer(model, prefix, QUESTIONS, ASKED_ABOUT, **sampling).equal(reference)
    assert not answer(model, prefix, QUESTIONS, ASKED_ABOUT, **sampling).equal(
        reference
    )  # it is chance, not greed


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")
@pytest.mark.parametrize("processor", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}])
def test_penalties_see_the_answer_alone(model, visual, processor):
    """As with whole prompts, which are embeddings: neither the question nor the prefix counts as said."""
    reference = one_by_one(model, visual, **GREEDY, **processor)
    out = answer(model, seen(model, visual), QUESTIONS, ASKED_ABOUT, **GREEDY, **processor)
    assert all(same(row, one[0]) for row, one in zip(out, reference, strict=True))


def test_a_prefix_is_not_changed_by_use(model, visual):
    start = begin(model, HEAD)
    prefix = extend(model, start, model.project(visual), [0, 0, 0])
    before = [tensor.clone() for part in (start, prefix) for layer in part.layers for tensor in layer]
    first = answer(model, prefix, QUESTIONS[:3], [0, 1, 2], **GREEDY)
    extend(model, prefix, model.project(visual), [2, 2, 0])
    answer(model, prefix, QUESTIONS[:3], [0, 1, 2], **GREEDY, num_beams=2)
    after = [tensor for part in (start, prefix) for layer in part.layers for tensor in layer]
    assert all(map(torch.equal, before, after))
    assert answer(model, prefix, QUESTIONS[:3], [0, 1, 2], **GREEDY).equal(first)


def test_text_alone_with_and_without_a_beginning(model):
    reference = [model.generate(torch.cat([HEAD, one])[None], **GREEDY)[0] for one in QUESTIONS]
    rows = [0] * len(QUESTIONS)
    shared = answer(model, begin(model, HEAD), QUESTIONS, rows, **GREEDY)
    prompts = [torch.cat([HEAD, one]) for one in QUESTIONS]
    none = answer(model, begin(model, HEAD[:0]), prompts, rows, **GREEDY)
    assert all(same(row, one) for row, one in zip(shared, reference, strict=True))
    assert all(same(row, one) for row, one in zip(none, reference, strict=True))


def test_logits_are_computed_for_one_position_a_step(model, visual):
    """Never for a position of the prompt but its last: not of a prefix, nor of a whole prompt."""
    shapes: list[tuple[int, int]] = []
    hook = model.lm_head.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
    try:
        prefix = seen(model, visual)
        assert shapes == []
        answer(model, prefix, QUESTIONS, ASKED_ABOUT, **GREEDY)
        assert set(shapes) == {(len(QUESTIONS), 1)}
        shapes.clear()
        model.generate(whole(QUESTIONS[0])[None], visual_tokens=[visual[0]], **GREEDY)
        assert set(shapes) == {(1, 1)}
    finally:
        hook.remove()
