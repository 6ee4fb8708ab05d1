"""Tower and reducer in vLLM's front end: our own model's tokens, and bad requests found before the engine."""

import pytest
import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.mm_utils import process_images
from llava.serve.vllm import register


@pytest.fixture(scope="module")
def processor(mini_merged):
    register()
    config = ModelConfig(
        str(mini_merged), config_format="llava", dtype="float32", mm_processor_kwargs={"reducer": "prumerge"}
    )
    return MULTIMODAL_REGISTRY.create_processor(config)


def process(processor, images, **kwargs):
    prompt = processor.info.get_tokenizer()("a <image> " * len(images)).input_ids
    items = processor.info.parse_mm_data({"image": images})
    return processor(prompt, mm_items=items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("reducer", ["none", "prumerge+", "prumerge", "topk(tokens=9)"])
def test_the_engine_gets_the_tokens_our_model_computes(processor, mini, pictures, reducer):
    _, model, image_processor = mini
    model.set_reducer(reducer)
    images = [image for image, _ in pictures.values()][:2]
    done = process(processor, images, reducer=reducer)
    for index, image in enumerate(images):
        (wanted,) = model.encode_images(process_images([image], image_processor, model.config))
        found = done["mm_kwargs"]["image"][index]["visual_tokens"].data
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert done["mm_placeholders"]["image"][index].length == len(wanted)


def test_caches_know_a_picture_by_its_canonical_reducer(processor, pictures):
    image = pictures["coffee.jpg"][0]

    def digest(**kwargs):
        return process(processor, [image], **kwargs)["mm_hashes"]["image"][0]

    default = digest()  # the server's: prumerge
    assert digest(reducer="prumerge") == digest(reducer=" prumerge ( ) ") == default
    assert digest(reducer="topk(tokens=9)") == digest(reducer="topk( tokens = 9 )") != default


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"reducer": "prumergr"}, "prumergr"),
        ({"reducer": "topk(tokens=0)"}, "tokens"),
        ({"reducer": ["prumerge"]}, "prumerge"),
        ({"reducer": 5}, "5"),
        ({"patches": 3}, "patches"),
        ({"reducer": "cdpruner"}, "question"),
    ],
)
def test_what_a_request_gets_wrong_is_a_value_error_that_names_it(processor, pictures, kwargs, named):
    with pytest.raises(ValueError, match=named):
        process(processor, [pictures["coffee.jpg"][0]], **kwargs)


def test_start_up_needs_no_tower(processor):
    fresh = MULTIMODAL_REGISTRY.create_processor(processor.info.ctx.model_config)
    done = fresh.get_dummy_mm_inputs({"image": 2})
    assert [one.length for one in done["mm_placeholders"]["image"]] == [24 * 24 + 24] * 2
    assert "encoder" not in vars(fresh)
