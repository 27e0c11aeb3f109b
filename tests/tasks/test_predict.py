"""Predictions of fine-tuned runs: files, tables, resume, and how large images are looked at."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from infmae_jax.tasks.finetuned import load_finetuned
from tests.commands import run
from tests.tasks.cases import CASES


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 70), np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(20000, 30000, (40, 33)).astype(np.uint16)).save(folder / "deep" / "b.png")
    Image.fromarray(rng.integers(0, 256, (12, 9), np.uint8)).save(folder / "tiny.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


@pytest.mark.parametrize("kind", CASES)
def test_predict_writes_original_pixels_and_goes_on_where_it_was(runs, kind, images, tmp_path):
    folder, _ = runs(kind)
    command = "infmae_jax.predict", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}", images
    done = run(*command)
    assert done.returncode == 4 and "broken.png" in done.stderr and "Traceback" not in done.stderr
    results = tmp_path / "out" / "predictions.jsonl"
    rows = {row["image"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert set(rows) == {"a", "deep/b", "tiny"}
    sizes = {"a": (50, 70), "deep/b": (40, 33), "tiny": (12, 9)}
    for name, row in rows.items():
        assert (row["height"], row["width"]) == sizes[name]
        picture = np.asarray(Image.open(tmp_path / "out" / row["class_map" if kind == "segment" else "masks"]))
        assert picture.shape == sizes[name]
        if kind == "segment":
            classes = load_finetuned(folder).model.classes
            numbers, counts = np.unique(picture, return_counts=True)
            truth = {
                classes[n]: pytest.approx(c / picture.size, abs=1e-6) for n, c in zip(numbers, counts, strict=True)
            }
            assert row["shares"] == truth
        else:
            probabilities = np.asarray(Image.open(tmp_path / "out" / row["probabilities"])) / 65535
            assert ((probabilities > 0.5) == (picture > 0)).all()
    # cut off inside a line, as a kill leaves it: what is missing is made again, what is there is not
    text = results.read_text().splitlines(keepends=True)
    results.write_text(text[0] + text[1][:20])
    first = json.loads(text[0])["image"]
    done = run(*command)
    assert done.returncode == 4
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert again[0] == rows[first] and {row["image"]: row for row in again} == rows
    gone = tmp_path / "out" / rows["a"]["class_map" if kind == "segment" else "masks"]
    gone.unlink()
    assert run(*command).returncode == 4 and gone.is_file()
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(row["image"] for row in again) == sorted(rows)
    # another image under an old name
    mine = tmp_path / "images" / "a.png"
    mine.parent.mkdir()
    Image.fromarray(np.zeros((21, 34), np.uint8)).save(mine)
    assert run(*command[:-1], mine).returncode == 0
    again = {row["image"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert (again["a"]["height"], again["a"]["width"]) == (21, 34) and again["tiny"] == rows["tiny"]
    assert np.asarray(Image.open(gone)).shape == (21, 34)


def test_predictions_of_another_model_and_folders_in_the_way_are_refused(runs, images, tmp_path):
    segment, targets = runs("segment")[0], runs("small_target")[0]
    out = tmp_path / "out"
    assert run("infmae_jax.predict", f"--checkpoint={segment}", f"--output={out}", images / "a.png").returncode == 0
    done = run("infmae_jax.predict", f"--checkpoint={targets}", f"--output={out}", images / "a.png")
    assert done.returncode == 2 and "another model" in done.stderr
    done = run("infmae_jax.predict", f"--checkpoint={segment}", f"--output={images}", images / "a.png")
    assert done.returncode == 2 and "not empty" in done.stderr
    done = run("infmae_jax.predict", f"--checkpoint={segment}", f"--output={tmp_path / 'new'}", tmp_path / "none")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "does not exist" in done.stderr


def test_targets_are_listed_by_peak_and_in_a_table_as_the_threshold_says(runs, images, tmp_path):
    folder, _ = runs("small_target")
    (images / "a.png").rename(images / "=a.png")
    for threshold in ("0.00995", "0.01005"):  # the untrained head is everywhere near its prior
        out = tmp_path / threshold
        arguments = f"--checkpoint={folder}", f"--output={out}", images, "--threshold", threshold
        assert run("infmae_jax.predict", *arguments).returncode == 4
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        with (out / "targets.csv").open(newline="") as stream:
            table = list(csv.reader(stream))
        assert table[0] == ["image", "row", "column", "area", "peak"]
        found = []
        for row in rows:
            scores = np.asarray(Image.open(out / row["probabilities"])) / 65535
            mask = np.asarray(Image.open(out / row["masks"])) > 0
            assert (mask == (scores > float(threshold)))[abs(scores - float(threshold)) > 1e-5].all()
            peaks = [target["peak"] for target in row["targets"]]
            assert peaks == sorted(peaks, reverse=True) and sum(t["area"] for t in row["targets"]) == mask.sum()
            name = row["image"].replace("=a", "'=a")
            found += [[name, *(str(t[key]) for key in ("row", "column", "area", "peak"))] for t in row["targets"]]
        assert table[1:] == found and len(found) > 1
    done = run("infmae_jax.predict", *arguments[:3], "--threshold=0.5")
    assert done.returncode == 2 and "another model or settings" in done.stderr


@pytest.mark.parametrize("kind", CASES)
def test_tiles_in_place_of_the_whole_image(runs, kind, tmp_path):
    """Where one tile covers the image nothing changes; elsewhere it is what windows of that size give."""
    folder, _ = runs(kind)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96), np.uint8)
    whole = load_finetuned(folder)
    covered = load_finetuned(folder, tile=(64, 96))
    expected = np.asarray(whole.model.compute(whole.params, image))
    np.testing.assert_array_equal(covered.model.compute(whole.params, image), expected)
    tiled = load_finetuned(folder, tile=(64, 64), overlap=32)
    assert tiled.model.config.windows.stride == (32, 32)
    Image.fromarray(image[0]).save(tmp_path / "x.png")
    arguments = f"--checkpoint={folder}", f"--output={tmp_path / 'out'}", "--tile=64", "--overlap=32"
    assert run("infmae_jax.predict", *arguments, tmp_path / "x.png").returncode == 0
    found = np.asarray(tiled.model.compute(whole.params, image))[0]
    assert not np.array_equal(found, expected[0])
    if kind == "segment":
        np.testing.assert_array_equal(Image.open(tmp_path / "out/classes/x.png"), found)
    else:
        np.testing.assert_array_equal(Image.open(tmp_path / "out/probabilities/x.png"), np.rint(found * 65535))
    done = run("infmae_jax.evaluate", f"--checkpoint={folder}", f"--output={tmp_path / 'scores'}", "--tile=96,128")
    assert done.returncode == 0 and "windows of 96x128, stride 63x85" in done.stdout, done.stderr
    again, first = (json.loads((at / "scores.json").read_text()) for at in (tmp_path / "scores", folder / "evaluation"))
    assert {**again, "protocol": ""} == {**first, "protocol": ""}  # the images are no larger than the tile


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("segment", ["--threshold=0.4"], "--threshold is for small targets; this is a run of segment"),
        ("small_target", ["--threshold=50"], "--threshold=50 is a probability"),
        ("segment", ["--tile=100"], "--tile=100,100: give rows,columns, multiples of 32"),
        ("segment", ["--tile=64", "--overlap=64"], "--overlap=64: give rows,columns, multiples of 32"),
        ("segment", ["--tile=a"], "--tile=a is not rows,columns"),
        ("segment", ["--overlap=16"], "--overlap belongs to --tile"),
    ],
)
def test_mistakes_of_options_are_one_line(runs, kind, arguments, message, tmp_path):
    done = run("infmae_jax.predict", f"--checkpoint={runs(kind)[0]}", f"--output={tmp_path / 'out'}", "x", *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
