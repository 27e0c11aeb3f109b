"""The prepare command, from files on disk to shards, lists and errors."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example, decode_pixels
from data_pipelines.prepare import PrepareConfig, prepare
from data_pipelines.shards import ShardReader, read_manifest, verify_shards
from tests import commands

REPOSITORY = Path(__file__).parents[2]


def scene(seed: int, height: int = 48, width: int = 64, dtype=np.uint8) -> np.ndarray:
    """A blurred random scene that uses most of the range of `dtype`."""
    coarse = np.random.default_rng(seed).integers(30, 226, (6, 8), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return image if dtype == np.uint8 else image.astype(np.uint16) * 200 + 7


def write_images(folder: Path, count: int, first_seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        if index % 3 == 2:
            Image.fromarray(scene(first_seed + index, dtype=np.uint16)).save(folder / f"{index:04d}.png")
        else:
            Image.fromarray(scene(first_seed + index)).save(folder / f"{index:04d}.jpg", quality=90)


def read_rejected(output: Path) -> list[dict[str, str]]:
    with (output / "rejected.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def shard_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.array_record"))}


def run_prepare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_every_file_is_kept_or_rejected_with_a_reason(tmp_path):
    write_images(tmp_path / "in" / "nested", 7)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "empty.jpg").touch()
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "in" / "flat.png")
    Image.fromarray(np.uint8([[0, 255]] * 30).repeat(20, 1)).save(tmp_path / "in" / "mask.png")
    Image.fromarray(scene(1, 19, 19)).save(tmp_path / "in" / "tiny.png")
    manifest = prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    assert (manifest.count, sum(manifest.settings["rejected"].values())) == (7, 5)
    assert {row["path"]: row["reason"] for row in read_rejected(tmp_path / "out")} == {
        "in/empty.jpg": "empty_file",
        "in/flat.png": "constant",
        "in/mask.png": "too_few_levels",
        "in/notes.txt": "not_an_image",
        "in/tiny.png": "too_small",
    }
    manifest = read_manifest(tmp_path / "out")
    assert manifest.count == 7 and manifest.bit_depths == {"8": 5, "16": 2} and manifest.sizes == {"64x48": 7}
    verify_shards(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_stored_pixels_are_the_sources(tmp_path):
    write_images(tmp_path / "in", 6)
    prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    for stored in ShardReader(tmp_path / "out"):
        record = decode_example(stored)
        source = (tmp_path / record.key).read_bytes()
        with Image.open(io.BytesIO(source)) as image:
            np.testing.assert_array_equal(decode_pixels(record), np.asarray(image))
        if record.key.endswith(".jpg"):
            assert record.image == source


def test_manifest_statistics_against_numpy(tmp_path):
    write_images(tmp_path / "in", 2)
    manifest = prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    images = [np.asarray(Image.open(path)) / 255 for path in sorted((tmp_path / "in").iterdir())]
    entropies = []
    for image in images:
        _, counts = np.unique(image, return_counts=True)
        entropies.append(-np.sum(counts / image.size * np.log2(counts / image.size)))
    assert manifest.mean == pytest.approx(np.mean(images), abs=1e-9)
    assert manifest.std == pytest.approx(np.std(images), abs=1e-9)
    assert manifest.entropy == pytest.approx(np.mean(entropies), abs=1e-9)


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path):
    write_images(tmp_path / "a", 300)
    write_images(tmp_path / "b", 40, first_seed=1000)
    config = PrepareConfig(shard_bytes=200_000)
    results = []
    for workers in (0, 2):
        output = tmp_path / f"out{workers}"
        manifest = prepare([tmp_path / "a", tmp_path / "b"], output, config, workers=workers)
        results.append((shard_bytes(output), manifest, (output / "rejected.csv").read_bytes()))
    assert len(results[0][0]) > 2
    assert results[0] == results[1]


def test_same_request_again_returns_the_finished_set_and_another_is_refused(tmp_path):
    write_images(tmp_path / "in", 3)
    first = prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    assert prepare([tmp_path / "in"], tmp_path / "out", workers=0) == first
    write_images(tmp_path / "in", 4)
    with pytest.raises(InputError, match="exists already"):
        prepare([tmp_path / "in"], tmp_path / "out", workers=0)


def test_symbolic_link_loops_end(tmp_path):
    write_images(tmp_path / "in" / "sub", 2)
    os.symlink(tmp_path / "in", tmp_path / "in" / "sub" / "up")
    os.symlink(tmp_path / "in" / "self", tmp_path / "in" / "self")
    os.symlink(tmp_path / "nowhere", tmp_path / "in" / "broken")
    os.mkfifo(tmp_path / "in" / "pipe")
    manifest = prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    assert manifest.count == 2 and sum(manifest.settings["rejected"].values()) == 4
    assert {row["path"]: row["reason"] for row in read_rejected(tmp_path / "out")} == {
        "in/broken": "unreadable",
        "in/pipe": "not_a_file",
        "in/self": "symlink_loop",
        "in/sub/up": "symlink_loop",
    }


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "no files below"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x")), "not_an_image 1"),
    ],
)
def test_unusable_input_is_one_line_and_leaves_nothing(tmp_path, make, named):
    make(tmp_path / "in")
    with pytest.raises(InputError, match=named) as caught:
        prepare([tmp_path / "in"], tmp_path / "out")
    assert str(tmp_path / "in") in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "in"] == []


def test_command_prints_what_became_of_the_files(tmp_path):
    write_images(tmp_path / "in", 4)
    (tmp_path / "in" / "x.txt").write_text("text")
    result = run_prepare(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--workers=1")
    assert result.returncode == 0, result.stderr
    assert "found 5 files, kept 4, rejected not_an_image 1" in result.stdout
    flags = f"--input={tmp_path / 'in'}/*.bmp", f"--output={tmp_path / 'other'}"
    wrong = commands.run("data_pipelines.prepare.__main__", *flags)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: no file matches")


def test_raw_shards_hold_the_same_pixels(tmp_path):
    write_images(tmp_path / "in", 6)
    prepare([tmp_path / "in"], tmp_path / "source", workers=0)
    manifest = prepare([tmp_path / "in"], tmp_path / "raw", PrepareConfig(encoding="raw"), workers=0)
    stored = [[decode_example(data) for data in ShardReader(tmp_path / name)] for name in ("source", "raw")]
    assert manifest.count == 6 and {example.encoding for example in stored[1]} == {"raw"}
    assert {example.bit_depth for example in stored[1]} == {8, 16}
    for source, raw in zip(*stored, strict=True):
        assert source.key == raw.key and source.attributes == raw.attributes
        np.testing.assert_array_equal(decode_pixels(source), decode_pixels(raw))
    with pytest.raises(InputError, match="encoding 'zip' is unknown"):
        prepare([tmp_path / "in"], tmp_path / "zip", PrepareConfig(encoding="zip"))


def test_what_this_package_made_is_no_input(tmp_path):
    write_images(tmp_path / "in", 4)
    first = prepare([tmp_path / "in"], tmp_path / "in" / "shards", workers=0)
    assert prepare([tmp_path / "in"], tmp_path / "in" / "shards", workers=0) == first
    os.symlink(tmp_path / "in" / "shards", tmp_path / "in" / "link")
    (tmp_path / "in" / "old.partial").mkdir()
    (tmp_path / "in" / "old.partial" / "prepare_plan").write_text("of a killed run")
    (tmp_path / "in" / "mine").mkdir()
    (tmp_path / "in" / "mine" / "manifest.json").write_text("{}")  # a manifest of something else
    again = prepare([tmp_path / "in"], tmp_path / "other", workers=0)
    assert again.count == 4
    assert {row["path"]: row["reason"] for row in read_rejected(tmp_path / "other")} == {
        "in/link": "shard_set",
        "in/mine/manifest.json": "not_an_image",
        "in/old.partial": "shard_set",
        "in/shards": "listed_twice",
    }
    by_pattern = prepare([f"{tmp_path}/in/**/*.png"], tmp_path / "pattern", workers=0)
    assert by_pattern.count == 1 and not by_pattern.settings["rejected"]
    with pytest.raises(InputError, match="exists already"):
        prepare([tmp_path / "in" / "mine"], tmp_path / "in", workers=0)


def test_home_folders_are_expanded_and_urls_refused(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert prepare(["~/in"], "~/out", workers=0) == read_manifest(tmp_path / "out")
    for output in ("gs://bucket/x", "s3://b", "http://host/x"):
        with pytest.raises(InputError, match="is not supported here"):
            prepare(["in"], output, workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    write_images(tmp_path / "in", 3)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", "/proc/out"):
        with pytest.raises(InputError, match="cannot be written") as caught:
            prepare([tmp_path / "in"], output, workers=0)
        assert "\n" not in str(caught.value)


def test_cells_of_the_list_are_no_formulas(tmp_path):
    write_images(tmp_path / "in", 1)
    folder = tmp_path / "=cmd|calc"
    folder.mkdir()
    (folder / "\x1b[2Jx\u202e.txt").write_text("x")
    prepare([tmp_path / "in", folder], tmp_path / "out", workers=0)
    assert [row["path"] for row in read_rejected(tmp_path / "out")] == ["'=cmd|calc/\\x1b[2Jx\\u202e.txt"]
