"""Reducers that read the question, and requests with reducers of their own: batched equals one by one."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_checkpoints import PIECE, family, whole_clip, write_json
from transformers import CLIPModel, CLIPTokenizer

from llava.engine import ModelSource, Request, finish
from llava.errors import UserError
from llava.mm_utils import process_images

LONG = "which of the wooden chairs behind a table is painted in a darker green"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny family with a tower that is a whole CLIP: text model, projections, tokenizer of letters."""
    tiny = family(tmp_path_factory.mktemp("tiny"))
    whole_clip(tiny.tower)
    write_json(tiny.full / "generation_config.json", {"suppress_tokens": list(range(3, 259))})
    return tiny


@pytest.fixture(scope="module")
def engine(tiny):
    return ModelSource(str(tiny.full), conv_mode="vicuna_v1", device="cpu").load()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(1)
    files = [folder / f"{number}.png" for number in range(3)]
    for file in files:
        pixels = (torch.rand((60, 60, 3), generator=generator) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(file)
    return files


@torch.no_grad()
def test_clips_own_text_and_patches(tiny, engine, pictures):
    clip = CLIPModel.from_pretrained(tiny.tower).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny.tower)
    short = tokenizer("red car", return_tensors="pt").input_ids
    assert short.shape[1] <= PIECE
    reducer = engine.model.make_reducer("cdpruner(tokens=4)")
    found = engine.read_question("<image>\nred car", reducer)
    torch.testing.assert_close(found["text_embeds"], clip.get_text_features(short).pooler_output)

    ids = tokenizer(LONG).input_ids
    pieces = [ids[1:-1][at : at + PIECE - 2] for at in range(0, len(ids) - 2, PIECE - 2)]
    expected = [clip.get_text_features(torch.tensor([[ids[0], *piece, ids[-1]]])) for piece in pieces]
    expected = torch.cat([one.pooler_output for one in expected])
    assert len(expected) > 3
    torch.testing.assert_close(engine.read_question(LONG, reducer)["text_embeds"], expected)

    pixels = process_images([Image.open(pictures[0])], engine.image_processor, engine.model.config)
    states = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    features = engine.model.get_vision_tower()(pixels, ("image_embeds",))
    expected = clip.visual_projection(clip.vision_model.post_layernorm(states[:, 1:]))
    torch.testing.assert_close(features.image_embeds, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_content_words_are_rows_of_the_embedding_table(engine):
    reducer = engine.model.make_reducer("mmtok")

    def rows(*words: str) -> torch.Tensor:
        ids = [id for word in words for id in engine.tokenizer(word, add_special_tokens=False).input_ids]
        return engine.model.get_input_embeddings().weight[ids]

    question = "What is the dog's colour?\nAnswer the question using a single word or phrase."
    found = engine.read_question(question, reducer)
    assert set(found) == {"text_tokens"}
    torch.testing.assert_close(found["text_tokens"], rows("dog", "s", "colour"))
    torch.testing.assert_close(
        engine.read_question("What is it?", reducer)["text_tokens"], rows("What", "is", "it")
    )
    assert engine.read_question("", reducer)["text_tokens"].shape == (0, engine.model.config.hidden_size)


def questions(pictures) -> list[Request]:
    """Six reducers, each asked twice about each picture, and two pictures at once."""
    specs = ["cdpruner(tokens=5)", "mmtok(tokens=6)", None, "prumerge", "topk(tokens=3)", "mmtok(tokens=2)"]
    requests = []
    for n in range(36):
        text = f"{n} " + LONG[n : n + 17]
        requests.append(
            Request(id=n, text=text, images=[pictures[n % 3]], max_new_tokens=5, reducer=specs[n // 3 % 6])
        )
    return [
        *requests,
        Request(id="two", text="Alike?", images=pictures[:2], reducer=specs[0], max_new_tokens=5),
    ]


@torch.no_grad()
def slowly(engine, request: Request) -> tuple[str, list[int]]:
    """Alone, through the model's reducer and plain generate."""
    model = engine.model
    model.set_reducer(request.reducer or "none")
    images = [Image.open(file) for file in request.images]
    text = engine.read_question(request.text, model.reducer)
    blocks = model.embed_images(
        process_images(images, engine.image_processor, model.config), texts=[text] * len(images)
    )
    model.set_reducer("none")
    encoded = replace(request, images=blocks, reducer=None)
    return finish(engine.stream(encoded)).text, [len(block) for block in blocks]


def test_reducers_of_requests_batched_as_alone(engine, pictures):
    requests = questions(pictures)
    answers = {answer.id: answer for answer in engine.answer(requests)}
    for request in requests:
        text, counts = slowly(engine, request)
        streamed = finish(engine.stream(request))
        assert answers[request.id].text == streamed.text == text, request
        assert list(answers[request.id].visual_tokens) == list(streamed.visual_tokens) == counts
    assert answers[0].visual_tokens == (5,) and answers["two"].visual_tokens == (5, 5)


@pytest.mark.parametrize("spec", ["cdpruner(tokens=3)", "mmtok(tokens=3, alpha=0.1)"])
def test_another_question_keeps_other_patches(engine, pictures, spec):
    asked = [Request(text=text, reducer=spec) for text in ("red car", "green apple", "the sky", "a word")]
    kept = [engine.look(pictures[0], request) for request in asked]
    assert len({tuple(look.reduced[0].kept.flatten().tolist()) for look in kept}) > 1
    for request, look in zip(asked, kept, strict=True):
        (block,) = engine.encode([pictures[0]], request)
        (projected,) = engine.model.project([look.reduced[0].tokens[0]])
        torch.testing.assert_close(block, projected)


def test_a_reducer_that_cannot_be_had_is_one_sentence(tiny, engine, pictures, tmp_path):
    wrong = [Request(id=0, text="Hi", images=pictures[:1], reducer="nosuch"), Request(id=1, text="Hi")]
    answers = {answer.id: answer for answer in engine.answer(wrong)}
    assert "nosuch" in answers[0].problem and answers[1].problem is None
    assert "nosuch" in finish(engine.stream(wrong[0])).problem
    (tmp_path / "mine.py").write_text("raise SystemExit")
    code = Request(text="Hi", images=pictures[:1], reducer=f"{tmp_path / 'mine.py'}:mine")
    assert "mine.py" in finish(engine.stream(code)).problem  # a request must not run code
    pixels = torch.zeros(1, 3, 56, 56)
    with pytest.raises(UserError, match="question"):
        engine.model.encode_images(pixels, [engine.model.make_reducer("mmtok")])

    alone = tiny.copied_to(tmp_path / "alone")  # CLIP's vision half
    config = json.loads((alone.tower / "config.json").read_text())
    write_json(alone.tower / "config.json", {**config["vision_config"], "model_type": "clip_vision_model"})
    half = ModelSource(str(alone.full), conv_mode="vicuna_v1", device="cpu").load()
    assert "whole CLIP" in finish(half.stream(replace(code, reducer="cdpruner"))).problem
