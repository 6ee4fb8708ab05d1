"""vLLM's front end by itself: how its caches know a picture, and what it loads when."""

import pytest
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.serve.vllm import register
from tests.tiny_checkpoints import VISUAL_TOKENS, family, whole_clip


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    register()
    tiny = family(tmp_path_factory.mktemp("tiny"))
    whole_clip(tiny.tower)
    default = {"reducer": "prumerge"}
    config = ModelConfig(str(tiny.full), config_format="llava", dtype="float32", mm_processor_kwargs=default)
    return MULTIMODAL_REGISTRY.create_processor(config)


def test_start_up_needs_no_tower(processor):
    done = processor.get_dummy_mm_inputs({"image": 2})
    rows = VISUAL_TOKENS**0.5
    assert [one.length for one in done["mm_placeholders"]["image"]] == [VISUAL_TOKENS + rows] * 2
    assert "encoder" not in vars(processor)


def test_caches_know_a_picture_by_its_canonical_reducer_and_the_question_that_reads(processor, pictures):
    def digest(**kwargs) -> str:
        prompt = processor.info.get_tokenizer()("a <image>").input_ids
        items = processor.info.parse_mm_data({"image": [pictures["coffee.jpg"]]})
        return processor(prompt, mm_items=items, hf_processor_mm_kwargs=kwargs)["mm_hashes"]["image"][0]

    default = digest()  # the server's: prumerge
    assert digest(reducer="prumerge", question="a?") == digest(reducer=" prumerge ( ) ") == default
    assert digest(reducer="topk(tokens=9)") == digest(reducer="topk( tokens = 9 )") != default
    read = digest(reducer="cdpruner", question="a?")
    assert digest(reducer="cdpruner", question="a?") == read != digest(reducer="cdpruner", question="b?")
