"""TFDS builders: what goes in comes out, through TFDS and through this project's pipeline, without TensorFlow."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.builders.build import build
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example, decode_mask, decode_pixels
from data_pipelines.masking import MaskConfig
from data_pipelines.pipeline import PipelineConfig, fixed_batch, num_examples, record_keys, train_batches
from data_pipelines.shards import ShardReader, read_manifest, verify_shards
from data_pipelines.synthetic import CATEGORIES, SURFACES, write_dataset
from tests.commands import run
from tests.data_pipelines.shard_sets import counts

SIZE = (64, 80)
COUNT = 24


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder in the layout of real data sets."""
    return write_dataset(tmp_path_factory.mktemp("scenes") / "set", COUNT, seed=9, size=SIZE)


@pytest.fixture(scope="module")
def boxes(scenes, tmp_path_factory):
    return build("coco_boxes", tmp_path_factory.mktemp("data"), scenes)


def records(folder, split="train"):
    return {example.key: example for example in map(decode_example, ShardReader(folder, split))}


def content(folder):
    """The stored bytes of a training split, by key: Beam shuffles."""
    return {decode_example(stored).key: stored for stored in ShardReader(folder)}


def test_coco_boxes_equal_the_file(scenes, boxes):
    builder = tfds.builder_from_directory(boxes)
    names = builder.info.features["objects"]["label"].names
    assert names == list(CATEGORIES)
    for split in ("train", "val"):
        coco = json.loads((scenes / f"annotations/{split}.json").read_text())
        images = {f"{split}/{entry['file_name']}": entry for entry in coco["images"]}
        categories = {entry["id"]: entry["name"] for entry in coco["categories"]}
        source = builder.as_data_source(split)
        assert len(source) == len(images)
        for example in source:
            image = images[example["key"].decode()]
            wanted = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            scale = np.array([image["height"], image["width"]] * 2)
            found = np.asarray(example["objects"]["bbox"]).reshape(-1, 4) * scale
            pixels = np.array([[b[1], b[0], b[1] + b[3], b[0] + b[2]] for b in (a["bbox"] for a in wanted)])
            assert np.allclose(found, pixels.reshape(-1, 4), atol=1e-3)
            labels = [names[label] for label in example["objects"]["label"]]
            assert labels == [categories[a["category_id"]] for a in wanted]
            assert np.array_equal(example["objects"]["area"], [a["area"] for a in wanted])
            file = np.asarray(Image.open(scenes / "images" / example["key"].decode()))
            assert np.array_equal(example["image"][..., 0], file)


def test_boxes_are_clipped_and_empty_ones_left_out(scenes, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    path = root / "annotations/train.json"
    coco = json.loads(path.read_text())
    name = coco["images"][0]["file_name"]
    frames = ([-8, 10, 16, 20], [70, 60, 40, 40], [90, 0, 5, 5], [3, 3, 0, 9])
    coco["annotations"] = [
        {"id": n, "image_id": coco["images"][0]["id"], "category_id": 2, "bbox": frame, "iscrowd": n % 2}
        for n, frame in enumerate(frames)
    ]
    path.write_text(json.dumps(coco))
    folder = build("coco_boxes", tmp_path / "data", root)
    source = tfds.builder_from_directory(folder).as_data_source("train")
    (example,) = [e for e in source if e["key"].decode() == f"train/{name}"]
    found = np.asarray(example["objects"]["bbox"]) * [64, 80, 64, 80]
    assert np.allclose(found, [[10, 0, 30, 8], [60, 70, 64, 80]], atol=1e-3)
    assert list(example["objects"]["is_crowd"]) == [False, True]


def test_shards_hold_the_labels_of_every_split(scenes, boxes):
    """What the pipeline reads without TFDS is what the annotation files say."""
    manifest = read_manifest(boxes)
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 18, "val": 6}
    assert manifest.classes == {"objects": CATEGORIES}
    coco = json.loads((scenes / "annotations/val.json").read_text())
    stored = records(boxes, "val")
    for image in coco["images"]:
        wanted = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        objects = stored[f"val/{image['file_name']}"].objects
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in wanted)]
        np.testing.assert_allclose(objects.boxes, np.array(corners).reshape(-1, 4), atol=1e-4)
        assert objects.classes.tolist() == [a["category_id"] - 1 for a in wanted]
        assert objects.area.tolist() == [a["area"] for a in wanted] and not objects.crowd.any()


@pytest.mark.parametrize("name,folder", [("class_masks", "class_masks"), ("small_targets", "target_masks")])
def test_masks_equal_the_files(scenes, tmp_path, name, folder):
    built = build(name, tmp_path, scenes)
    builder = tfds.builder_from_directory(built)
    names = SURFACES if name == "class_masks" else ("background", "target")
    assert read_manifest(built).classes == {"mask": names}
    stored = records(built, "val")
    for example in builder.as_data_source("val"):
        key = example["key"].decode()
        wanted = np.asarray(Image.open(scenes / folder / key))
        wanted = wanted if name == "class_masks" else wanted // 255
        assert np.array_equal(example["mask"][..., 0], wanted) and np.array_equal(decode_mask(stored[key]), wanted)
        assert np.array_equal(example["image"][..., 0], np.asarray(Image.open(scenes / "images" / key)))
    assert counts(built) == {"train": 18, "val": 6}


@pytest.mark.parametrize(
    "classes,values,stored",
    [([0, 7, 11], [0, 7, 11, 255], [0, 1, 2, 255]), ([0, 255], [0, 255], [0, 1]), ([5, 3, 1], [1, 3, 5], [2, 1, 0])],
)
def test_mask_values_become_places_in_the_list_of_classes(tmp_path, classes, values, stored):
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    mask = rng.choice(np.uint8(values), (40, 50))
    Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(tmp_path / "set/images/train/a.png")
    Image.fromarray(mask).save(tmp_path / "set/masks/train/a.png")
    table = {"classes": [{"value": value, "name": f"class {value}"} for value in classes]}
    (tmp_path / "set/classes.json").write_text(json.dumps(table))
    built = build("class_masks", tmp_path / "data", tmp_path / "set")
    (example,) = records(built).values()
    assert np.array_equal(decode_mask(example), np.select([mask == value for value in values], stored))
    assert read_manifest(built).classes["mask"] == tuple(f"class {value}" for value in classes)


def make_collection(root):
    """15 usable images in folders and in an archive, and 5 files that are not."""
    deep = root / "a" / "b"
    deep.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(deep / f"{index}.png")
    Image.fromarray(rng.integers(0, 60_000, (40, 50), dtype=np.uint16)).save(root / "deep.png")
    Image.fromarray(rng.integers(0, 256, (10, 12), dtype=np.uint8)).save(root / "tiny.png")
    Image.fromarray(np.full((40, 50), 9, np.uint8)).save(root / "flat.png")
    (root / "notes.txt").write_text("flight of Tuesday")
    whole = (deep / "0.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        for index in range(5):
            Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(root / "z.png")
            archive.write(root / "z.png", f"frames/{index}.png")
    (root / "z.png").unlink()
    return root


@pytest.mark.parametrize("name", ["image_folder", "inf30"])
def test_every_file_is_accounted_for(tmp_path, name):
    root = make_collection(tmp_path / "raw")
    built = build(name, tmp_path / "data", root, shards=3)
    rows = list(csv.DictReader((built / "rejected.csv").read_text().splitlines()))
    assert counts(built) == {"train": 15} and len(rows) == 5 == sum(read_manifest(built).settings["rejected"].values())
    reasons = {row["path"].split("/")[-1]: row["reason"] for row in rows}
    assert reasons == {"deep.png": "bit_depth", "tiny.png": "too_small", "flat.png": "constant", "cut.png": "truncated",
                       "notes.txt": "not_an_image"}  # fmt: skip
    stored = records(built)
    assert len(read_manifest(built).shards) == 3
    assert sum("more.zip" in key for key in stored) == 5
    for index in range(10):
        pixels = decode_pixels(stored[f"raw/a/b/{index}.png"])
        assert np.array_equal(pixels, np.asarray(Image.open(root / f"a/b/{index}.png")))


def test_sixteen_bit_images_come_back_bit_identical(tmp_path):
    root = make_collection(tmp_path / "raw")
    built = build("image_folder/gray16", tmp_path / "data", root)
    expected = np.asarray(Image.open(root / "deep.png"))
    ((key, record),) = records(built).items()
    assert key == "raw/deep.png" and record.bit_depth == 16
    assert np.array_equal(decode_pixels(record), expected)
    (example,) = tfds.builder_from_directory(built).as_data_source("train")
    assert example["image"].dtype == np.uint16 and np.array_equal(example["image"][..., 0], expected)
    assert read_manifest(built).bit_depths == {"16": 1}


def test_manifest_describes_all_splits(scenes, boxes):
    verify_shards(boxes)
    manifest = read_manifest(boxes)
    files = sorted((scenes / "images").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
    assert manifest.count == len(files) == 24 and manifest.sizes == {"80x64": 24}
    assert manifest.mean == pytest.approx(pixels.mean()) and manifest.std == pytest.approx(pixels.std())
    shares = [np.unique(image, return_counts=True)[1] / image.size for image in pixels]
    assert manifest.entropy == pytest.approx(np.mean([-(p * np.log2(p)).sum() for p in shares]))


def test_the_pipeline_reads_it(scenes, boxes):
    config = PipelineConfig(
        shards=(str(boxes),), image_size=(32, 48), batch_size=6, seed=1, mask=MaskConfig(stride=3), scale=(1.0, 1.0)
    )
    assert num_examples(config) == 18
    assert {key for step in range(3) for key in record_keys(config, step)} == set(records(boxes))
    batches = train_batches(config)
    try:
        batch = next(batches)
    finally:
        batches.close()
    assert batch["image"].shape == (6, 32, 48, 1) and batch["image"].dtype == np.uint8
    assert batch["ids_keep"].shape == (6, 2)
    assert fixed_batch(config, 4)["image"].std() > 10


def test_no_tensorflow_to_build_and_no_tfds_to_read(scenes, boxes, tmp_path):
    program = f"""
import sys
from data_pipelines.examples import decode_example
from data_pipelines.shards import ShardReader
assert decode_example(ShardReader({str(boxes)!r})[0]).width == 80
assert "tensorflow_datasets" not in sys.modules
import data_pipelines.builders
from data_pipelines.builders.build import build
import tensorflow_datasets as tfds
build("small_targets", {str(tmp_path)!r}, {str(scenes)!r})
assert len(tfds.data_source("small_targets/gray8", split="train", data_dir={str(tmp_path)!r})) == 18
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True)


def test_plain_tfds_makes_the_same_set(scenes, boxes, tmp_path):
    config = tfds.download.DownloadConfig(manual_dir=scenes)
    builder = tfds.builder("coco_boxes", data_dir=tmp_path)
    builder.download_and_prepare(download_config=config, download_dir=tmp_path / "downloads")
    train = tfds.data_source("coco_boxes", split="train", data_dir=tmp_path)
    assert {example["key"].decode() for example in train} == set(records(boxes))
    assert set(records(builder.data_path, "val")) == {f"val/{path.name}" for path in (scenes / "images/val").iterdir()}


def test_a_second_build_returns_the_first_unless_made_of_something_else(scenes, boxes, tmp_path):
    data = boxes.parents[2]
    before = os.stat(boxes / "manifest.json").st_mtime_ns
    assert counts(build("coco_boxes", data, scenes)) == {"train": 18, "val": 6}
    assert os.stat(boxes / "manifest.json").st_mtime_ns == before
    other = write_dataset(tmp_path / "other", 12, seed=1, size=SIZE)
    with pytest.raises(InputError, match="was made from"):
        build("coco_boxes", data, other)


def spoil(root, what):
    image = next((root / "images/train").iterdir())
    if what == "image":
        image.write_bytes(b"no image")
    elif what == "annotations":
        (root / "annotations/val.json").write_text("[1")
    elif what == "outside":
        path = root / "annotations/train.json"
        path.write_text(path.read_text().replace(image.name, "../" + image.name))
    elif what == "mask":
        (root / "class_masks/train" / image.name).unlink()
    elif what == "size":
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "class_masks/train" / image.name)
    elif what == "value":
        Image.fromarray(np.full(SIZE, 200, np.uint8)).save(root / "class_masks/train" / image.name)
    elif what == "colour":
        Image.fromarray(np.full((*SIZE, 3), (0, 1, 2), np.uint8)).save(root / "class_masks/train" / image.name)
    elif what == "classes":
        (root / "classes.json").unlink()
    elif what == "images":
        shutil.rmtree(root / "images")


@pytest.mark.parametrize(
    "name,what,message",
    [("coco_boxes", "image", "is not usable"), ("coco_boxes", "annotations", "val.json is not a COCO file"),
     ("coco_boxes", "outside", "leaves the folder"), ("class_masks", "mask", "no mask of the same stem"),
     ("class_masks", "size", "5x5, its image 80x64"), ("class_masks", "value", "value 200"),
     ("class_masks", "colour", "colour picture"), ("class_masks", "classes", "classes.json"),
     ("small_targets", "images", "known layout")],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_no_set(scenes, tmp_path, name, what, message):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    spoil(root, what)
    with pytest.raises(InputError, match=message) as caught:
        build(name, tmp_path / "data", root)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").rglob("*array_record*"))


def test_wrong_requests(scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("nonsense", tmp_path, scenes), "nonsense.*there are"),
        (("small_target", tmp_path, scenes), "did you mean small_targets?"),
        (("mnist", tmp_path, scenes), "'mnist' is unknown"),
        (("image_folder/gray12", tmp_path, scenes), "gray12"),
        (("image_folder", "gs://bucket/data", scenes), "gs:// is not supported"),
        (("image_folder", tmp_path, tmp_path / "gone"), "gone is not a folder"),
        (("inf30", tmp_path, tmp_path / "empty"), "empty is empty"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            build(*arguments)
        assert "\n" not in str(caught.value)


def test_a_build_leaves_nothing_behind_and_asks_nobody(scenes, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(tfds.core.utils.gcs_utils, "gcs_dataset_info_files", lambda _: pytest.fail("the network"))
    build("small_targets", tmp_path / "data", scenes)
    assert not list((tmp_path / "temporary").iterdir())


def test_command(scenes, tmp_path):
    command = "data_pipelines.builders.__main__", f"--data_dir={tmp_path}", "--dataset=small_targets"
    done = run(*command, f"--input={scenes}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/small_targets/gray8/1.0.0: train 18, val 6"
    wrong = run(*command, f"--input={tmp_path / 'gone'}")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: ")


def test_apache_beam_builds_the_same(scenes, boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # Beam leaves folders there
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'")
    built = build("coco_boxes", tmp_path / "beam", scenes, beam_options=["runner=DirectRunner"])
    assert counts(built) == {"train": 18, "val": 6}
    assert content(built) == content(boxes)
    collection = make_collection(tmp_path / "raw")
    alone = build("image_folder", tmp_path / "alone", collection)
    together = build("image_folder", tmp_path / "beam", collection, beam_options=["runner=DirectRunner"])
    assert read_manifest(together).settings["rejected"] == read_manifest(alone).settings["rejected"]
    assert content(together) == content(alone)
