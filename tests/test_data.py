"""Training data from file to batch: reading, the copy on disk, samples, batches, their order."""

import json
import multiprocessing
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llava.data import (
    BadSample,
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    dataset,
    length_grouped_order,
    table,
)
from llava.errors import UserError
from llava.model.tokenization import load_tokenizer

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

TOKENIZERS = Path(__file__).parent / "data" / "text" / "tokenizers"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(TOKENIZERS / "tok_nonlegacy")


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    size = {"shortest_edge": 28}
    return CLIPImageProcessorPil(size=size, crop_size={"height": 28, "width": 28})


def sample(*texts: str, **fields: object) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**fields, "conversations": turns}


def rows_of_every_kind() -> list[dict]:
    return [
        sample("<image>\nWhat is the dog doing?", "Read it: 日本 é 😀.", id=7, image="a.png"),
        sample("Why?", "So.", "And?", 'A "quoted" \\ thing\n', id="text", model="", score=0.5),
        sample("<image> and <image>?", "Both.", id="000000000139", image=["a.png", "b.png"]),
        sample("No picture here", "No.", image=None),
        sample("<image>", "Nothing.", id=None, image="b.png", width=3),
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list, name: str = "data.json", **options: object) -> Path:
        file = tmp_path / name
        if name.endswith("l"):
            file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
        else:
            file.write_text(json.dumps(rows, **options), encoding="utf-8")
        return file

    return write


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (30, 50)), ("b.png", (40, 20))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


Make = Callable[..., LazySupervisedDataset]


@pytest.fixture
def make(write: Callable[..., Path], image_folder: Path, tokenizer: object, processor: object) -> Make:
    """The samples of rows."""
    options = {"image_folder": image_folder}
    return lambda rows, **more: LazySupervisedDataset(write(rows), tokenizer, processor, **options, **more)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("form", ["list", "indented", "ascii", "lines", "parquet"])
def test_every_form_reads_like_json_load(form, write):
    rows = rows_of_every_kind() * 3
    if form == "parquet":
        for row in rows:
            row["image"] = [row["image"]] if isinstance(row.get("image"), str) else row.get("image")
            row["id"] = str(row.get("id"))
        rows = [{key: row[key] for key in ("id", "image", "conversations")} for row in rows]
        file = write([]).with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif form == "lines":
        file = write(rows, "data.jsonl")
    else:
        options = {"indented": {"indent": 2}, "list": {"ensure_ascii": False}, "ascii": {}}[form]
        file = write(rows, **options)
    assert list(table.read_rows(file)) == rows


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "bom.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows_of_every_kind()).encode())
    assert list(table.read_rows(file)) == rows_of_every_kind()


GOOD = json.dumps(rows_of_every_kind())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "after row 0"),
        (b"[]", "no rows"),
        (GOOD[:-1].encode(), "after row 5"),
        (GOOD[:-30].encode(), "after row 4"),
        (GOOD.replace('"id": "text"', '"id": text').encode(), "after row 1"),
        (b'{"conversations": []}\nnonsense\n', "after row 1"),
        (GOOD.encode().replace(b"quoted", b"\xff\xfe"), "after row 1"),
        (b"PAR1 but no more of it", "parquet"),
    ],
)
def test_broken_files_are_one_sentence_and_leave_no_copy(content, says, tmp_path, own_cache):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        table.open_table(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not copies(own_cache)


def test_broken_json_is_noticed_before_the_end_of_the_file(tmp_path):
    """A file of a gigabyte with an error in its first row must not be read into memory to say so."""
    file = tmp_path / "broken.json"
    with file.open("wb") as sparse:
        sparse.write(b'[{"id": 1 "oops": 2}, ')
        sparse.truncate(1 << 40)
    with pytest.raises(UserError, match="row 0"):
        next(table.read_rows(file))


def test_rows_have_one_schema(write):
    data = table.open_table(write(rows_of_every_kind()))
    assert data["id"][:] == ["7", "text", "000000000139", "", "None"]
    assert data["image"][:] == [["a.png"], [], ["a.png", "b.png"], [], ["b.png"]]
    assert data["conversations"][:] == [row["conversations"] for row in rows_of_every_kind()]
    words = [sum(len(t["value"].split()) for t in row["conversations"]) for row in rows_of_every_kind()]
    assert data["words"][:] == [words[0], -words[1], words[2], -words[3], words[4]]
    assert data["problem"][:] == [None] * 5


# ------------------------------------------------------------------------------------------ copy on disk


def copies(cache: Path) -> list[str]:
    return sorted(str(file) for file in cache.rglob("*.arrow") if "incomplete" not in str(file))


def test_the_copy_is_made_once_and_again_when_the_file_changes(write, own_cache, monkeypatch):
    file = write(rows_of_every_kind())
    first = table.open_table(file)
    with monkeypatch.context() as patch:
        patch.setattr(table, "read_rows", None)  # calling it would fail
        assert table.open_table(file)[:] == first[:]
    assert len(copies(own_cache)) == 1

    write(rows_of_every_kind()[:2])
    assert len(table.open_table(file)) == 2
    os.utime(file, ns=(1, 1))
    assert len(table.open_table(file)) == 2
    assert len(copies(own_cache)) == 3


def test_a_process_lets_go_of_rows_it_has_read(make, own_cache, monkeypatch):
    """The file is mapped anew now and then, and only the new mapping stays."""
    monkeypatch.setattr(dataset, "ROWS_PER_MAPPING", 3)
    data = make(rows_of_every_kind() * 4)
    whole = data.table[:]
    (name,) = copies(own_cache)
    tables = set()
    for index in range(len(data)):
        assert data.row(index) == {key: column[index] for key, column in whole.items()}
        tables.add(id(data.table))
        assert sum(name in line for line in Path("/proc/self/maps").read_text().splitlines()) == 1
    assert len(tables) > 1
    assert len(pickle.dumps(data.table)) < 20_000  # a worker gets the file's name, not its rows


def _rows(file: Path) -> int:
    return len(table.open_table(file))


def test_processes_that_begin_together_share_one_copy(write, own_cache):
    file = write(rows_of_every_kind() * 300)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_rows, [file] * 3) == [1500] * 3
    assert len(copies(own_cache)) == 1


# ---------------------------------------------------------------------------------------------- samples


def test_batch_is_the_references(golden):
    folder = golden / "llava"
    expected = json.loads((folder / "model" / "batch.json").read_text())
    tokenizer = load_tokenizer(folder / "ckpt" / "llava-tiny-v1.5-7b")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "ckpt" / "clip-tiny-336")
    dataset = LazySupervisedDataset(
        folder / "model" / "batch_data.json",
        tokenizer,
        processor,
        image_folder=folder / "images",
        image_aspect_ratio="pad",
    )
    assert dataset.lengths == expected["lengths"]
    assert dataset.modality_lengths == expected["modality_lengths"]
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[i] for i in range(3)])
    assert batch["input_ids"].tolist() == expected["input_ids"]
    assert batch["labels"].tolist() == expected["labels"]
    assert batch["attention_mask"].tolist() == [[bool(m) for m in row] for row in expected["attention_mask"]]
    # The reference puts a zero image where a sample has none.
    sums = [total for total in expected["image_sums"] if total != 0]
    assert [image.sum().item() for image in batch["images"]] == pytest.approx(sums, abs=0.05)


def test_images_come_in_the_order_of_their_placeholders(make, tokenizer):
    dataset = make(rows_of_every_kind())
    samples = [dataset[i] for i in range(5)]
    batch = DataCollatorForSupervisedDataset(tokenizer)(samples)
    a, b = samples[0]["images"][0], samples[4]["images"][0]
    assert not torch.equal(a, b)
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 28, 28)] * 4
    for got, expected in zip(batch["images"], (a, a, b, b), strict=True):
        assert torch.equal(got, expected)
    assert (batch["input_ids"] == -200).sum(dim=1).tolist() == [1, 0, 2, 0, 1]
    assert "images" not in samples[1] and "images" not in samples[3]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (sample("<image>", "x", "<image>?", "y", image="a.png"), "images: 1, <image> in its text: 2"),
        (sample("none", "x", image="a.png"), "images: 1"),
        (sample("<image>", "x"), "images: 0"),
        (sample("<image>", "x", image=["a.png", "b.png"]), "images: 2"),
        (sample("<image>", "x", image="gone.png"), "gone.png: no such image file"),
        ({"conversations": sample("a", "x", "b")["conversations"] * 2}, "turn 4 is from human"),
        (["a"], "object"),
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\]"),
        (sample("a", "b", image=["x", None]), "image"),
    ],
)
def test_bad_samples_name_file_row_and_reason(row, says, make):
    dataset = make([sample("a", "b"), row])
    assert 0 not in dataset.modality_lengths
    with pytest.raises(BadSample, match=says) as caught:
        dataset[1]
    assert f"{dataset.data_path} row 1 (id " in str(caught.value)


def test_a_bad_sample_is_one_sentence_from_a_worker_too(make):
    dataset = make([sample("a", "b"), sample("a <image>", "b", id="odd")])
    with pytest.raises(BadSample) as caught:
        list(DataLoader(dataset, batch_size=None, num_workers=1))
    assert str(caught.value).startswith(f"{dataset.data_path} row 1 (id odd): ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_gives_a_neighbour_of_the_same_kind_and_counts(workers, make):
    rows = [
        sample("<image>\none", "x", image="gone.png"),
        sample("text one", "x"),
        sample("<image>\ntwo", "x", image="a.png"),
        sample("text <image> two", "x"),
        sample("text three", "y"),
    ]
    dataset = make(rows, on_bad_sample="skip")
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=lambda batch: batch[0])
    ids = [one["input_ids"].tolist() for one in loader]
    good = [dataset.sample(i)["input_ids"].tolist() for i in (1, 2, 4)]
    assert ids == [good[1], good[0], good[1], good[2], good[2]]
    assert dataset.bad.nonzero().flatten().tolist() == [0, 3]


def test_skipping_ends_where_nothing_is_left(make):
    dataset = make([sample("<image>", "x")], on_bad_sample="skip")
    with pytest.raises(UserError, match="no sample of the kind of row 0"):
        dataset[0]


# ---------------------------------------------------------------------------------------------- batches


def fake(ids: list[int], images: int = 0) -> dict:
    tensor = torch.tensor(ids)
    one = {"input_ids": tensor, "labels": tensor.clone()}
    return one | ({"images": [torch.full((3, 2, 2), float(i)) for i in range(images)]} if images else {})


def test_unk_in_a_text_is_attended_to(tokenizer):
    assert tokenizer.pad_token_id == 0
    batch = DataCollatorForSupervisedDataset(tokenizer)([fake([1, 0, 5, 0]), fake([1, 2])])
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["input_ids"].tolist() == [[1, 0, 5, 0], [1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[1, 0, 5, 0], [1, 2, -100, -100]]


def test_cutting_takes_the_images_of_cut_placeholders(tokenizer):
    samples = [fake([1, -200, 5, -200, 7], images=2), fake([1, 2, 3]), fake([1, 2, 3, 4, -200], images=1)]
    batch = DataCollatorForSupervisedDataset(tokenizer, max_length=3)(samples)
    assert batch["input_ids"].tolist() == [[1, -200, 5], [1, 2, 3], [1, 2, 3]]
    assert [image.flatten()[0].item() for image in batch["images"]] == [0.0]
    batch = DataCollatorForSupervisedDataset(tokenizer, max_length=10)(samples)
    assert len(batch["images"]) == 3 and batch["input_ids"].shape == (3, 5)


def test_a_tokenizer_without_a_limit_cuts_nothing():
    tokenizer = load_tokenizer(TOKENIZERS / "tok_mpt", model_max_length=int(1e30))
    batch = DataCollatorForSupervisedDataset(tokenizer)([fake(list(range(1, 9)))])
    assert batch["input_ids"].shape == (1, 8)


def test_batch_is_one_by_one(make, tokenizer):
    dataset = make(rows_of_every_kind())
    collate = DataCollatorForSupervisedDataset(tokenizer)
    batch = collate([dataset[i] for i in range(5)])
    for i in range(5):
        alone = collate([dataset[i]])
        real = batch["attention_mask"][i]
        assert torch.equal(batch["input_ids"][i][real], alone["input_ids"][0])
        assert torch.equal(batch["labels"][i][real], alone["labels"][0])
        assert (batch["labels"][i][~real] == -100).all()


# ------------------------------------------------------------------------------------------------ order


def test_orders_are_the_references(text_data):
    for case in json.loads((text_data / "sampler.json").read_text())["sampler"]:
        what = case["lengths"], case["batch_size"], case["world_size"]
        torch.manual_seed(case["torch_seed"])
        assert length_grouped_order(*what) == case["order_modality"]
        if case["order_modality_with_generator_seed_plus1"]:
            torch.manual_seed(case["torch_seed"])
            generator = torch.Generator().manual_seed(case["torch_seed"] + 1)
            order = length_grouped_order(*what, generator=generator)
            assert order == case["order_modality_with_generator_seed_plus1"]
        if case["order_length_only"]:
            torch.manual_seed(case["torch_seed"])
            assert length_grouped_order(*what, by_modality=False) == case["order_length_only"]


def test_an_order_is_a_permutation_with_one_modality_a_mega_batch():
    rng = random.Random(0)
    for _ in range(30):
        lengths = [rng.randint(1, 300) * rng.choice((1, 1, 1, -1)) for _ in range(rng.randint(0, 90))]
        batch, world = rng.randint(1, 5), rng.randint(1, 4)
        order = length_grouped_order(lengths, batch, world, generator=torch.Generator().manual_seed(1))
        assert sorted(order) == list(range(len(lengths)))
        mega = batch * world
        signs = [{lengths[i] > 0 for i in order[k : k + mega]} for k in range(0, len(order) - 2 * mega, mega)]
        assert all(len(sign) == 1 for sign in signs)


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match="length 0"):
        length_grouped_order([3, 0, -2], 1, 1)
    assert sorted(length_grouped_order([3, 0, 2], 1, 1, by_modality=False)) == [0, 1, 2]
