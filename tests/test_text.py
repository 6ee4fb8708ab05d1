"""Tokenizers and labels: against the reference, against sentencepiece itself, and against LLaVA's own way of
counting tokens, written out plainly."""

import dataclasses
import json
import logging
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.data import encode_conversation
from llava.data.text import training_template
from llava.errors import UserError
from llava.mm_utils import tokenizer_image_token
from llava.model.checkpoints import save_tokenizer
from llava.model.tokenization import load_tokenizer

COPY = Path(__file__).parent / "data" / "text"
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.fixture(scope="module", params=["nonlegacy", "legacy"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer() -> LlamaTokenizer:
    return load_tokenizer(COPY / "tokenizers" / "tok_nonlegacy")


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    return load_tokenizer(COPY / "tokenizers" / "tok_mpt")


# ------------------------------------------------------------------------------------------- tokenizers


def agree(tokenizer: PreTrainedTokenizerFast, cases: list[dict]) -> None:
    for case in cases:
        assert tokenizer(case["text"]).input_ids == case["ids"], case
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded"], case


def test_ids_and_text_are_the_references_also_after_saving(text_data, kind, tmp_path):
    cases = json.loads((text_data / "raw_tokenize.json").read_text())[kind]
    tokenizer = load_tokenizer(text_data / "tokenizers" / f"tok_{kind}")
    agree(tokenizer, cases)
    agree(pickle.loads(pickle.dumps(tokenizer)), cases)  # as a loader's worker gets it

    save_tokenizer(tokenizer, tmp_path)
    saved = {file.name for file in tmp_path.iterdir()}
    assert saved >= {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    agree(load_tokenizer(tmp_path), cases)
    save_tokenizer(load_tokenizer(tmp_path), tmp_path)  # onto itself
    (tmp_path / "tokenizer.model").unlink()
    agree(load_tokenizer(tmp_path), cases)

    # transformers' own save does not say `legacy`; tokenizer.json still does.
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.pop("legacy") == (kind == "legacy")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    agree(load_tokenizer(tmp_path), cases)


def with_late_spaces(source: Path, target: Path) -> None:
    """The sentencepiece model with runs of spaces ranked last, as LLaMA-like vocabularies have them."""
    proto = sentencepiece_model.ModelProto()
    proto.ParseFromString(source.read_bytes())
    runs = [piece for piece in proto.pieces if set(piece.piece) == {"▁"}]
    assert len(runs) > 1
    for piece in runs:
        piece.score = -1e9
    target.write_bytes(proto.SerializeToString())


class Slow:
    """transformers 4's LlamaTokenizer, as far as ids go: sentencepiece on each stretch of plain text.

    legacy: every stretch as sentencepiece does it alone, its dummy space included. Otherwise one dummy space
    at the very front, which goes again when a special token comes first.
    """

    def __init__(self, model: Path, legacy: bool):
        self.legacy = legacy
        proto = sentencepiece_model.ModelProto()
        proto.ParseFromString(model.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())
        # Without dummy spaces sentencepiece drops leading ones. A newline in front keeps them; it is a byte
        # of its own and merges with nothing.
        self.guard = "" if legacy else "\n"
        self.skip = 0 if legacy else len(self.pieces.encode("\n"))

    def __call__(self, text: str) -> list[int]:
        ids = [1]
        for position, stretch in self.stretches(text):
            if stretch in SPECIAL:
                ids.append(SPECIAL[stretch])
            else:
                front = " " if position == 0 and not self.legacy else ""
                ids += self.pieces.encode(self.guard + front + stretch)[self.skip :]
        return ids

    @staticmethod
    def stretches(text: str) -> list[tuple[int, str]]:
        found, start = [], 0
        while start < len(text):
            marks = [(text.find(mark, start), mark) for mark in SPECIAL if text.find(mark, start) >= 0]
            end, mark = min(marks, default=(len(text), ""))
            if end > start:
                found.append((start, text[start:end]))
            if mark:
                found.append((end, mark))
            start = end + len(mark)
        return found


@pytest.mark.parametrize("late_spaces", [False, True])
def test_ids_are_sentencepieces(kind, late_spaces, tmp_path):
    source = COPY / "tokenizers" / f"tok_{kind}"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    if late_spaces:
        with_late_spaces(source / "tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer, slow = load_tokenizer(tmp_path), Slow(tmp_path / "tokenizer.model", kind == "legacy")
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    saved = load_tokenizer(tmp_path)
    parts = ["USER", "ASSISTANT:", " ", "  ", " " * 5, " " * 17, "\n", "é", "日本", "😀", "5", "47", "dog",
             "bridge", "hello", "</s>", "<s>", "<unk>", ".", "▁", "\t", "x", "  red", " kite"]  # fmt: skip
    rng = random.Random(0)
    for _ in range(800):
        text = "".join(rng.choices(parts, k=rng.randint(0, 9)))
        expected = slow(text)
        assert tokenizer(text).input_ids == expected, text
        assert saved(text).input_ids == expected, text


@pytest.mark.parametrize(
    "name",
    ["llava-tiny-v1.5-7b", "llava-tiny-v1.5-7b-withtower", "llava-tiny-1.5-7b-hf", "vicuna-tiny-7b-v1.5"],
)
def test_every_kind_of_checkpoint_has_the_same_tokenizer(name, golden):
    """The automatic choice would lose the space in front: config.json says `model_type: llava`."""
    tokenizer = load_tokenizer(golden / "llava" / "ckpt" / name)
    agree(tokenizer, json.loads((golden / "llava" / "text" / "raw_tokenize.json").read_text())["nonlegacy"])
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == ("<pad>" if name.endswith("-hf") else "<unk>")


def test_keywords_win():
    folder = COPY / "tokenizers" / "tok_nonlegacy"
    tokenizer = load_tokenizer(folder, padding_side="left", model_max_length=77, pad_token="[PAD]")
    assert (tokenizer.padding_side, tokenizer.model_max_length, tokenizer.pad_token_id) == ("left", 77, 1200)
    text = "</s>USER"
    legacy = load_tokenizer(folder, legacy=True)(text).input_ids
    assert legacy == load_tokenizer(COPY / "tokenizers" / "tok_legacy")(text).input_ids
    assert legacy != tokenizer(text).input_ids


def test_legacy_where_only_the_model_is_there(tmp_path):
    """transformers 4 took `legacy` for True when no file said anything."""
    shutil.copy(COPY / "tokenizers" / "tok_legacy" / "tokenizer.model", tmp_path)
    agree(load_tokenizer(tmp_path), json.loads((COPY / "raw_tokenize.json").read_text())["legacy"])


def test_other_kinds_are_read_as_they_are(chatml):
    assert chatml("").input_ids == []
    text = "<|im_start|>user\n Hé 日本?<|im_end|>"
    ids = chatml(text).input_ids
    assert (
        ids == Tokenizer.from_file(str(COPY / "tokenizers" / "tok_mpt" / "tokenizer.json")).encode(text).ids
    )
    assert chatml.decode(ids) == text
    assert chatml.pad_token_id == chatml.unk_token_id


def test_a_byte_level_tokenizer_under_llamas_name_is_not_mended(chatml, tmp_path):
    shutil.copytree(COPY / "tokenizers" / "tok_mpt", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = " Read  the sign:\n 47 km"
    assert (
        load_tokenizer(tmp_path)(text).input_ids
        == load_tokenizer(COPY / "tokenizers" / "tok_mpt")(text).input_ids
    )


def test_unusable_tokenizers_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no-such/model"):  # tests run without a network
        load_tokenizer("no-such/model")
    source = COPY / "tokenizers" / "tok_nonlegacy"
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes()[:500])
    with pytest.raises(UserError, match=r"tokenizer\.model|cannot be read"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------- labels


def encode_case(case: dict, folder: Path) -> tuple[list[int], list[int]]:
    tokenizer = load_tokenizer(
        folder / "tokenizers" / f"tok_{case['tokenizer']}", model_max_length=case["model_max_length"]
    )
    if case["mm_use_im_start_end"]:
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    ids, labels = encode_conversation(
        case["conversations"],
        tokenizer,
        version=case["version"],
        has_image=case["has_image"],
        is_multimodal=case["is_multimodal"],
        mm_use_im_start_end=case["mm_use_im_start_end"],
    )
    assert ids.dtype == labels.dtype == torch.int64
    return ids.tolist(), labels.tolist()


def test_labels_are_the_references(text_data, caplog):
    """All versions. For mpt with a tokenizer that knows its markers the reference masks everything, by
    mistake: the next test has the rule from before."""
    for case in json.loads((text_data / "preprocess.json").read_text())["cases"]:
        caplog.clear()
        ids, labels = encode_case(case, text_data)
        assert ids == case["input_ids"], case["id"]
        if training_template(case["version"]).version == "mpt" and case["tokenizer"] == "mpt":
            assert any(label != -100 for label in labels)
            continue
        assert labels == case["labels"], case["id"]
        assert any("takes no part" in line for line in caplog.messages) == case["mismatch_warning"], case[
            "id"
        ]


def test_mpt_labels_are_the_references_before_its_mistake(text_data):
    for case in json.loads((text_data / "preprocess_fork113_mpt.json").read_text())["cases"]:
        assert encode_case(case, text_data) == (case["input_ids"], case["labels"]), case["id"]


def counted(text: str, tokenizer: LlamaTokenizer, has_image: bool, version: str) -> list[int]:
    """LLaVA's way (facts: training.md, section 5): each round tokenised alone, its length added up."""

    def length(part: str) -> int:
        return len(tokenizer_image_token(part, tokenizer) if has_image else tokenizer(part).input_ids)

    whole = tokenizer_image_token(text, tokenizer) if has_image else tokenizer(text).input_ids
    whole = whole if has_image else whole[: tokenizer.model_max_length]
    labels = [-100] * len(whole)
    separator = " ASSISTANT: " if version == "v1" else "[/INST] "
    at = 1
    for i, one in enumerate(text.split("</s>")):
        if one == "" or len(one.split(separator)) != 2:
            break
        round_length = length(one)
        question_length = length(one.split(separator)[0] + separator) - 2
        if version == "v1" and i > 0 and not tokenizer.legacy:
            round_length, question_length = round_length - 1, question_length - 1
        labels[at + question_length : at + round_length] = whole[at + question_length : at + round_length]
        at += round_length
    if at < tokenizer.model_max_length and at != len(whole):
        return [-100] * len(whole)
    return labels


@pytest.mark.parametrize("version", ["v1", "llava_v1", "llava_llama_2", "mistral_instruct"])
def test_labels_are_those_of_counting(kind, version, caplog):
    caplog.set_level(logging.CRITICAL, "llava.data.text")
    tokenizer = load_tokenizer(COPY / "tokenizers" / f"tok_{kind}")
    words = ["the dog", "USER:", "47", "é", "\n", " ", "  ", "kite.", "日本", "red", "bridge", "?", "#",
             "ASSISTANT:", "[INST]", "</s>", "<s>", " ASSISTANT: ", "[/INST] "]  # fmt: skip
    weights = [6] * 13 + [1] * 6  # the template's own markers now and then
    rng = random.Random(1)
    masked = 0
    for _ in range(150):
        tokenizer.model_max_length = rng.choice([40, 120, 2048])
        has_image = rng.random() < 0.5
        turns = []
        for who in ("human", "gpt") * rng.randint(1, 4):
            turns.append({"from": who, "value": "".join(rng.choices(words, weights, k=rng.randint(1, 8)))})
        if any("</s>" in turn["value"] and "[/INST] " in turn["value"] for turn in turns):
            # Such a text looks like a whole round. It is read as one here; whether counting masks it is up to
            # the vocabulary.
            continue
        if has_image:
            turns[0]["value"] = "<image>\nx" + turns[0]["value"].rstrip()
        template = conv_templates[version].copy()
        for i, turn in enumerate(turns):
            template.append_message(template.roles[i % 2], turn["value"])
        ids, labels = encode_conversation(turns, tokenizer, version, has_image=has_image)
        text = template.get_prompt()
        expected = tokenizer_image_token(text, tokenizer) if has_image else tokenizer(text).input_ids
        assert ids.tolist() == (expected if has_image else expected[: tokenizer.model_max_length])
        counting = "v1" if version.endswith("v1") else "llama_2"
        assert labels.tolist() == counted(text, tokenizer, has_image, counting), turns
        masked += bool((labels == -100).all())
    assert 0 < masked < 110


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def learnt(tokenizer: PreTrainedTokenizerFast, labels: torch.Tensor) -> str:
    return tokenizer.decode(labels[labels != -100], skip_special_tokens=False)


ROLES = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_3 = Conversation(
    ROLES.format("system") + "You answer.", (ROLES.format("user"), ROLES.format("assistant")),
    [], 0, SeparatorStyle.MPT, "<|eot_id|>", None, "llama_3",
)  # fmt: skip
QWEN_2 = dataclasses.replace(
    conv_templates["smollm2"], system="<|im_start|>system\nYou are a helpful assistant.", version="qwen_2"
)


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("version", ["smollm2", "chatml_direct", "mpt", "qwen_2", "llama_3"])
def test_answers_and_their_end_are_learnt_whatever_the_template(version, has_image, chatml, monkeypatch):
    """Against the text put together piece by piece, each piece learnt as a whole or not at all."""
    for name, template in (("qwen_2", QWEN_2), ("llama_3", LLAMA_3)):
        if name not in conv_templates:
            monkeypatch.setitem(conv_templates, name, template)
    chatml.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    )
    template = conv_templates[version]
    texts = ["How many?", "Two, ask <why>.", "Why?", " Because\n\nof it.", "日本?", "é"]
    if has_image:
        texts[0] = "<image>\nHow many?"
    pieces = [(template.system + template.sep, False)]
    for i, text in enumerate(texts):
        pieces += [(template.roles[i % 2], False), (text + template.sep, i % 2 == 1)]
    expected_ids, expected = [], []
    for piece, is_learnt in pieces:
        ids = tokenizer_image_token(piece, chatml)
        expected_ids += ids
        expected += ids if is_learnt else [-100] * len(ids)
    ids, labels = encode_conversation(turns(*texts), chatml, version, has_image=has_image)
    assert ids.tolist() == expected_ids
    assert labels.tolist() == expected
    assert learnt(chatml, labels) == "".join(text + template.sep for text in texts[1::2])


@pytest.mark.parametrize("texts", [("a", "b <|im_end|> c"), ("a", ""), ("a", "", "b", "c"), ("a", "b", "c")])
def test_chatml_is_masked_where_its_turns_cannot_be_told_apart(texts, chatml):
    _, labels = encode_conversation(turns(*texts), chatml, "smollm2", has_image=False)
    assert (labels == -100).all()


@pytest.mark.parametrize("version", ["v1", "llava_llama_2"])
def test_a_tokenizer_without_bos_learns_the_same_text(chatml, version):
    ids, labels = encode_conversation(turns("<image>\nHow?", "So.", "Why?", "Thus."), chatml, version)
    text = learnt(chatml, labels)
    assert text.replace(" ", "") == "So.</s>Thus.</s>"
    assert int(labels[0]) == -100 and ids[labels != -100].tolist() == labels[labels != -100].tolist()


def test_several_images_stay_where_they_stand(tokenizer):
    conversation = turns("<image> or <image>?", "First.", "And <image>?", "No.")
    ids, _ = encode_conversation(conversation, tokenizer, several_images=True)
    assert (ids == -200).sum() == 3
    ids, _ = encode_conversation(conversation, tokenizer)
    assert (ids == -200).sum() == 2  # those of one turn become one


@pytest.mark.parametrize(
    ("conversation", "version", "says"),
    [
        ([], "v1", "no turn from human"),
        ([{"from": "system", "value": "x"}], "v1", "from 'system'"),
        ([{"from": "human"}], "v1", "has no text"),
        ([*turns("a", "b"), {"from": "gpt", "value": "c"}], "v1", "turn 3 is from gpt"),
        (turns("", "b"), "llava_llama_2", "give the first turn a text"),
        (turns("<image>", "b", "c", "d"), "plain", "version plain"),
    ],
)
def test_conversations_that_cannot_be_encoded(conversation, version, says, tokenizer):
    with pytest.raises(UserError, match=says):
        encode_conversation(conversation, tokenizer, version)
