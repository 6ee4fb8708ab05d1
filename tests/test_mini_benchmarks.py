"""The small benchmark sets: the official loaders take them, their labels are true, their scorers score."""

import base64
import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_truth import truth, type_of

from llava.errors import UserError
from llava.eval.benchmarks import mmbench, mme, pope, scienceqa, textvqa, vqav2
from llava.eval.benchmarks.base import SHORT
from llava.mini import benchmarks, formats, world

N = 8
MODULES = {"pope": pope, "mme": mme, "textvqa": textvqa, "vqav2": vqav2, "scienceqa": scienceqa}
MODULES["mmbench"] = mmbench


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "eval-mini"
    benchmarks.generate(folder, 4, N)
    return folder


@pytest.fixture(scope="module")
def scenes(root):
    """{path of the picture: what it shows}, read back from objects.jsonl."""
    found = {}
    for line in (root / "objects.jsonl").read_text().splitlines():
        row = json.loads(line)
        things = [{("name" if k == "class" else k): v for k, v in thing.items()} for thing in row["objects"]]
        things = tuple(world.Thing(**thing) for thing in things)
        found[row["image"]] = world.Scene(0, things, row["counted"], row["background"])
    return found


@pytest.fixture(scope="module", params=MODULES)
def loaded(request, root):
    """(benchmark, samples) as `llava eval` and `llava score` load them."""
    benchmark = MODULES[request.param].BENCHMARK
    return benchmark, benchmark.load(root)


def scene_of(sample, root, scenes):
    if isinstance(sample.image, str):
        return scenes[f"mmbench/{sample.id % 1_000_000}"]
    return scenes[str(sample.image.relative_to(root))]


def right_answer(sample, root, scenes):
    """From the sample's own text and the scene, never from its reference."""
    lines = [line for line in sample.text.split("\n") if not line.startswith(("Context:", "Reference OCR"))]
    question = lines[0]
    options = [match.groups() for line in lines if (match := re.match(r"([A-D])\. (.*)", line))]
    if sample.image is None:
        kind = re.match(r"Which of these is an? (\w+)", question)[1]
        return next(letter for letter, text in options if text in formats.KINDS[kind])
    answer = truth(question, scene_of(sample, root, scenes))
    return next(letter for letter, text in options if text == answer) if options else answer


def test_labels_are_true_and_score_full_marks(loaded, root, scenes):
    benchmark, samples = loaded
    assert all(sample.reference is not None for sample in samples)
    answers = [right_answer(sample, root, scenes) for sample in samples]
    result = benchmark.score(samples, answers)["metrics"]
    full = 200 * len(formats.SUBTASKS) if benchmark.name == "mme" else 100
    assert result[benchmark.headline] == pytest.approx(full)
    wrong = ["gibberish" for _ in samples]
    floor = benchmark.score(samples, wrong)["metrics"][benchmark.headline]
    assert floor == 0 or (benchmark.name == "pope" and floor == pytest.approx(200 / 3))  # read as yes


def test_pictures_are_there(loaded):
    _, samples = loaded
    for sample in samples:
        if isinstance(sample.image, str):
            _, _, data = sample.image.partition(",")
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        elif sample.image is None:
            continue
        else:
            assert isinstance(sample.image, Path)
            picture = Image.open(sample.image)
        with picture:
            assert picture.size == (336, 336)
            picture.load()


def test_pope_is_balanced_and_its_categories_differ(root, scenes):
    samples = pope.load(root)
    assert len(samples) == 18 * N
    table = {}
    for sample in samples:
        table.setdefault((sample.category, sample.unit), []).append((sample.text, sample.reference))
    for (category, image), rows in table.items():
        assert Counter(label for _, label in rows) == {"yes": 3, "no": 3}
        assert len({text for text, _ in rows}) == 6
        yes = {text for text, label in rows if label == "yes"}
        assert yes == {text for text, label in table["random", image] if label == "yes"}, category
    # Negatives of `popular` are classes that many pictures hold, more often than those drawn anywhere.
    holds = Counter(
        thing
        for image, scene in scenes.items()
        if image.startswith("pope/")
        for thing in {t.name for t in scene.objects}
    )
    mean = {
        category: np.mean(
            [holds[s.text.split()[3]] for s in samples if s.category == category and s.reference == "no"]
        )
        for category in pope.OFFSETS
    }
    assert mean["popular"] > mean["random"] and mean["adversarial"] > mean["random"]


def test_mme_holds_one_yes_and_one_no_a_picture(root):
    samples = mme.load(root)
    assert len(samples) == 2 * N * len(formats.SUBTASKS)
    pairs = {}
    for sample in samples:
        pairs.setdefault(sample.unit, []).append(sample.reference)
        expected = {"count": "counting", "OCR": "words", "existence": "presence"}
        assert type_of(sample.text.removesuffix(SHORT)) == expected.get(sample.category, sample.category)
    assert all(sorted(pair) == ["no", "yes"] for pair in pairs.values())


def test_textvqa_gives_no_ocr_away(root):
    for sample in textvqa.load(root):
        assert sample.text.endswith("\nReference OCR token: " + SHORT)
        assert len(sample.reference) == 10
        assert sample.reference[0] not in sample.text.lower().split()


def test_vqav2_upload_lists_all_of_test2015(root, tmp_path):
    samples = vqav2.load(root)
    outside = vqav2.BENCHMARK.optional(root, samples)
    assert outside and not {s.id for s in samples} & {s.id for s in outside}
    out = tmp_path / "upload.json"
    vqav2.BENCHMARK.write(out, root, {str(sample.id): "Yes" for sample in samples})
    assert len(json.loads(out.read_text())) == len(samples) + len(outside)
    assert {reference[0] for reference in (s.reference for s in samples)} >= {"yes/no", "other"}


def test_mmbench_rotations(root):
    groups = {}
    for sample in mmbench.load(root):
        groups.setdefault(sample.unit, []).append(sample)
    assert len(groups) == N
    for rows in groups.values():
        assert [row.id // 1_000_000 for row in rows] == [0, 1, 2, 3]
        texts = {row.options["ABCD".index(row.reference[0])] for row in rows}
        assert len(texts) == 1 and {row.reference[0] for row in rows} == set("ABCD")
        for before, after in pairwise(rows):
            assert after.options == before.options[-1:] + before.options[:-1]


def test_every_letter_is_equally_often_right(root):
    with_picture = [sample for sample in scienceqa.load(root) if sample.image]
    assert Counter(sample.reference[0] for sample in with_picture) == dict.fromkeys(range(4), N // 4)


def test_blind_scores_are_those_of_the_scorers(root):
    blind = json.loads((root / "mini.json").read_text())["blind"]
    assert blind["pope"]["answer"] == "Yes" and blind["pope"]["score"] == pytest.approx(200 / 3)
    assert blind["mme"]["score"] == pytest.approx(50 * len(formats.SUBTASKS))
    assert blind["mmbench"]["score"] == 0 and blind["scienceqa"]["score"] <= 40


def test_same_seed_same_files_another_seed_refused(root, tmp_path):
    again = tmp_path / "again"
    benchmarks.generate(again, 4, 2)
    benchmarks.generate(tmp_path / "third", 4, 2)
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert files and not again.with_name("again.part").exists()
    for file in files:
        assert (again / file).read_bytes() == (tmp_path / "third" / file).read_bytes()
    before = (root / "mini.json").stat().st_mtime_ns
    benchmarks.generate(root, 4, N)
    assert (root / "mini.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other data"):
        benchmarks.generate(root, 5, N)
