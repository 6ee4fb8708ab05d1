"""llava tools push: the card says what the checkpoint is, and training state is not sent."""

import json

import pytest
from huggingface_hub import ModelCard
from tiny_checkpoints import edit_json, family, write_json

from llava.cli import main
from llava.tools import push


@pytest.fixture
def checkpoint(tmp_path):
    tiny = family(tmp_path)
    edit_json(tiny.lora / "config.json", mm_token_reducer="prumerge+(tokens=144)")
    edit_json(tiny.lora / "adapter_config.json", base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    for name in ("checkpoint-5/optimizer.pt", "training_args.bin", "trainer_state.json", ".cache/a"):
        (tiny.lora / name).parent.mkdir(exist_ok=True)
        (tiny.lora / name).write_text("x")
    return tiny.lora


SENT = {"adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin"}


def test_the_card_and_the_files(checkpoint, tmp_path, capsys):
    keys = ("benchmark", "reducer", "score", "visual_tokens", "partial")
    table = [("pope", "prumerge+", 84.04, 144.2, False)]
    table += [("gqa", "none", 50.0, None, True), ("mme", "none", None, None, False)]
    runs = [dict(zip(keys, row, strict=True)) for row in table]
    write_json(tmp_path / "report.json", {"runs": runs, "published": []})
    flags = ["--data", "665K", "--scores", str(tmp_path / "report.json"), "--license", "llama2", "--dry-run"]
    assert main(["tools", "push", str(checkpoint), "me/mine", *flags]) == 0
    text, _, files = capsys.readouterr().out.partition("\nREADME.md\n")
    assert set(files.split()) == SENT
    card = ModelCard(text)
    assert card.data.base_model == "lmsys/vicuna-7b-v1.5" and card.data.license == "llama2"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_value) == ("pope", 84.04)
    for fact in ("prumerge+(tokens=144)", "lmsys/vicuna-7b-v1.5", "towers/clip-tiny", "665K", "84.0", "50.0"):
        assert fact in card.text


def test_what_is_sent(checkpoint, monkeypatch):
    """The Hub's side is played: what arrives is the card and the files of the dry run."""
    (checkpoint / "README.md").write_text("# my own words")
    sent = {}

    class Hub:
        def create_repo(self, name, private, exist_ok):
            sent["repository"] = name, private

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            sent[path_in_repo] = path_or_fileobj

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            names = [str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()]
            sent["files"] = set(push.filter_repo_objects(names, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(push, "HfApi", Hub)
    assert main(["tools", "push", str(checkpoint), "me/mine", "--private"]) == 0
    assert sent == {"repository": ("me/mine", True), "README.md": b"# my own words", "files": SENT}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["mine"], "OWNER/NAME"),
        (["me/mine", "--scores", "config.json"], "llava report"),
        (["me/mine"], "me/mine was not written"),  # the tests' environment is offline
    ],
)
def test_what_cannot_be_sent(checkpoint, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(checkpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["tools", "push", str(checkpoint), *flags]) == 2
    assert named in capsys.readouterr().err
    assert json.loads((checkpoint / "config.json").read_text())
