"""The model a training run starts from: the checkpoint's own choices, and the flags that were given."""

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import TOWER_HIDDEN, Family, edit_json
from tiny_training import FLAGS

from llava.model.builder import load_pretrained_model
from llava.train.arguments import parse
from llava.train.setup import Prepared, build


def prepare(tiny: Family, flags: str, base: Path | None = None) -> Prepared:
    """`build` on a command line; the data file is only looked for."""
    (data := tiny.root / "data.json").write_text("[]")
    argv = f"--model_name_or_path {base or tiny.full} --data_path {data} --output_dir {tiny.root / 'run'} "
    return build(*parse((argv + flags).split(), say=lambda line: None), lambda line: None)


def add_own_tower(tiny: Family) -> None:
    """Make of the tiny LLaVA one like LLaVA-1.6: its own tower, the stock one doubled, in its files."""
    stock = load_pretrained_model(tiny.full, device="cpu")[1].get_vision_tower().backbone.state_dict()
    shard = tiny.full / "pytorch_model-00001-of-00002.bin"
    own = {f"model.vision_tower.vision_tower.vision_model.{n}": 2 * t.float() for n, t in stock.items()}
    torch.save({**torch.load(shard), **own}, shard)
    index = tiny.full / "pytorch_model.bin.index.json"
    weight_map = dict.fromkeys(own, shard.name)
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], **weight_map})
    edit_json(tiny.full / "config.json", unfreeze_mm_vision_tower=True)


def test_training_uses_the_tower_the_checkpoint_carries(tiny):
    stock = prepare(tiny, FLAGS).llava.get_vision_tower().backbone.state_dict()
    add_own_tower(tiny)
    # The second: the tower by the name that the checkpoint records, as every script of LLaVA gives it.
    for flags in (FLAGS, f"{FLAGS} --vision_tower towers/clip-tiny"):
        own = prepare(tiny, flags).llava.get_vision_tower().backbone.state_dict()
        assert all(torch.equal(own[name], 2 * stock[name]) for name in stock if stock[name].ndim)
    other = prepare(tiny, f"{FLAGS} --vision_tower {tiny.tower}").llava.get_vision_tower().backbone
    assert all(torch.equal(tensor, stock[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("field", "recorded", "given"),
    [
        ("mm_vision_select_layer", -2, -1),
        ("mm_vision_select_feature", "cls_patch", "patch"),
        ("mm_patch_merge_type", "spatial", "flat"),
        ("mm_token_reducer", "topk(tokens=4)", "none"),
    ],
)
def test_a_flag_that_is_given_wins_and_one_that_is_not_leaves_the_checkpoint_s(tiny, field, recorded, given):
    """`given` is what the flag means in LLaVA where it is left out."""
    edit_json(tiny.full / "config.json", **{field: recorded})
    flags = "--version v1 --use_cpu True"
    assert getattr(prepare(tiny, flags).llava.config, field) == recorded
    assert getattr(prepare(tiny, f"{flags} --{field} {given}").llava.config, field) == given


def test_what_llava_s_flags_mean_where_nothing_says(tiny):
    flags = f"--version v1 --use_cpu True --vision_tower {tiny.tower}"
    llava = prepare(tiny, flags, tiny.base).llava
    config = llava.config
    assert (config.mm_projector_type, config.mm_vision_select_layer) == ("linear", -1)
    assert (config.mm_vision_select_feature, config.mm_patch_merge_type) == ("patch", "flat")
    assert config.mm_token_reducer == "none"
    assert llava.get_model().mm_projector.weight.shape == (config.hidden_size, TOWER_HIDDEN)
