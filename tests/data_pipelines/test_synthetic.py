"""Synthetic thermal scenes: labels that fit the pictures, the same in any process, the folder and its command."""

import csv
import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import label

from data_pipelines.errors import InputError
from data_pipelines.synthetic import CATEGORIES, SCENE_CLASSES, SURFACES, generate_scene, is_val, write_dataset
from data_pipelines.synthetic import dataset as dataset_module
from data_pipelines.synthetic.canvas import Stage

CLASSES = len(SCENE_CLASSES)


@pytest.fixture(scope="module")
def scenes():
    return [generate_scene(7, index) for index in range(20 * CLASSES)]


def boxes_of(scene):
    """Category, edges and area of each object."""
    found = scene.objects
    names = [CATEGORIES[number] for number in found.classes]
    return list(zip(names, found.boxes.astype(int).tolist(), found.area.tolist(), strict=True))


def entropy(image):
    share = np.bincount(image.ravel(), minlength=256) / image.size
    share = share[share > 0]
    return float(-np.sum(share * np.log2(share)))


def test_entropy_is_that_of_real_sets(scenes):
    entropies = [entropy(scene.image) for scene in scenes]
    assert 6.4 <= np.mean(entropies) <= 7.1
    assert min(entropies) > 4.5
    for name in SCENE_CLASSES:
        assert 6.2 <= np.mean([e for e, s in zip(entropies, scenes) if s.scene_class == name]) <= 7.4, name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**31), st.sampled_from([(64, 64), (96, 200), (200, 96), (112, 128)]))
def test_any_seed_and_size_gives_a_consistent_scene(seed, index, size):
    scene = generate_scene(seed, index, size)
    assert scene.image.shape == scene.class_mask.shape == scene.target_mask.shape == size
    assert scene.image.dtype == scene.class_mask.dtype == np.uint8 and scene.target_mask.dtype == bool
    assert scene.scene_class == SCENE_CLASSES[index % CLASSES]
    assert scene.class_mask.max() < len(SURFACES)
    assert scene.image.std() > 3
    for (x0, y0, x1, y1), area in zip(scene.objects.boxes, scene.objects.area, strict=True):
        assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
        assert 0 < area <= (x1 - x0) * (y1 - y0)


def test_boxes_fit_the_class_mask(scenes):
    surface = {"bird": "aircraft"}
    for scene in scenes:
        seen = np.zeros_like(scene.target_mask)
        for category, (x0, y0, x1, y1), area in boxes_of(scene):
            window = (slice(y0, y1), slice(x0, x1))
            value = SURFACES.index(surface.get(category, category))
            assert np.sum(scene.class_mask[window] == value) >= area
            seen[window] = True
        movable = np.isin(scene.class_mask, [SURFACES.index(name) for name in ("boat", "aircraft")])
        # Left without a box are only slivers of an object that something nearer covers almost whole.
        assert np.sum(movable & ~seen) <= 0.02 * scene.image.size


def test_box_is_the_tight_frame_of_what_stays_visible():
    canvas = Stage(64, 96, np.random.default_rng(0))

    def rectangle(left, top, right, bottom):
        return canvas.polygon([(left, top), (right, top), (right, bottom), (left, bottom)])

    hidden, cut = canvas.add_object("vehicle"), canvas.add_object("person")
    canvas.paint(rectangle(10, 10, 20, 20), 5.0, "vehicle", hidden)
    canvas.paint(rectangle(40, 30, 59, 39), 30.0, "person", cut)
    canvas.paint(rectangle(0, 0, 30, 30), 1.0, "building")
    canvas.paint(rectangle(50, 0, 70, 60), 1.0, "building")
    found = canvas.objects()
    assert (found.boxes.tolist(), found.classes.tolist()) == ([[40, 30, 50, 40]], [CATEGORIES.index("person")])
    assert found.area.tolist() == [100] and not found.crowd.any()
    assert np.sum(canvas.instance == cut) == 100 and not np.any(canvas.instance == hidden)


def test_small_targets_are_small_and_stand_out(scenes):
    sizes, contrasts = [], []
    for scene in scenes:
        parts, count = label(scene.target_mask)
        for number in range(1, count + 1):
            part = parts == number
            sizes.append(part.sum())
            y, x = np.nonzero(part)
            near = np.zeros_like(part)
            near[max(0, y.min() - 4) : y.max() + 5, max(0, x.min() - 4) : x.max() + 5] = True
            ring = scene.image[near & ~scene.target_mask].astype(float)
            contrasts.append(abs(scene.image[part].mean() - ring.mean()) / (ring.std() + 1))
    assert len(sizes) > 40 and np.percentile(sizes, 95) < 81
    assert np.median(contrasts) > 1.5


def test_every_label_occurs(scenes):
    surfaces = set(np.unique(np.concatenate([np.unique(scene.class_mask) for scene in scenes])))
    assert surfaces == set(range(len(SURFACES)))
    assert {category for scene in scenes for category, _, _ in boxes_of(scene)} == set(CATEGORIES)


def _accuracy(features, labels, train):
    """Ridge regression onto one-hot labels, standardised features."""
    features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-6)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    x, y = features[train], np.eye(CLASSES)[labels[train]]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    return np.mean(np.argmax(features[~train] @ weights, axis=1) == labels[~train])


def test_class_shows_in_structure_not_in_brightness():
    scenes = [generate_scene(3, index, (128, 160)) for index in range(60 * CLASSES)]
    labels = np.array([SCENE_CLASSES.index(scene.scene_class) for scene in scenes])
    train = np.arange(len(scenes)) < 40 * CLASSES
    images = np.stack([scene.image for scene in scenes]).astype(np.float32)
    brightness = np.stack([images.mean((1, 2)), images.std((1, 2))], axis=1)
    down, across = np.diff(images, axis=1)[:, :, :-1], np.diff(images, axis=2)[:, :-1]
    turn = (np.arctan2(down, across) % np.pi / np.pi * 8).astype(int) % 8
    strength = np.hypot(down, across)
    cells = [(strength * (turn == k))[:, :124, :156].reshape(-1, 4, 31, 4, 39).mean((2, 4)) for k in range(8)]
    structure = np.log1p(np.stack(cells, axis=1)).reshape(len(scenes), -1)
    assert _accuracy(brightness, labels, train) < 0.4
    assert _accuracy(structure, labels, train) > 0.65


def test_same_scene_in_another_process():
    def digest(scene):
        arrays = scene.image.tobytes() + scene.class_mask.tobytes() + scene.target_mask.tobytes()
        return hashlib.sha256(arrays + repr((scene.scene_class, scene.objects)).encode()).hexdigest()

    here = [digest(generate_scene(11, index, (80, 96))) for index in range(CLASSES)]
    program = f"""
import hashlib
from data_pipelines.synthetic import generate_scene
for index in reversed(range({CLASSES})):
    scene = generate_scene(11, index, (80, 96))
    arrays = scene.image.tobytes() + scene.class_mask.tobytes() + scene.target_mask.tobytes()
    print(hashlib.sha256(arrays + repr((scene.scene_class, scene.objects)).encode()).hexdigest())
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.split()[::-1] == here
    assert len(set(here)) == len(here)


def test_speed():
    generate_scene(0, 0)
    start = time.process_time()
    for index in range(2 * CLASSES):
        generate_scene(1, index)
    assert (time.process_time() - start) / (2 * CLASSES) < 0.15  # about 0.03 s on an idle core


def test_folder_holds_what_the_scenes_hold(tmp_path):
    count = 3 * CLASSES
    folder = write_dataset(tmp_path / "set", count, seed=5, size=(96, 128))
    rows = list(csv.DictReader((folder / "class_labels.csv").read_text().splitlines()))
    described = json.loads((folder / "classes.json").read_text())
    assert [entry["name"] for entry in described["classes"]] == list(SURFACES)
    assert len(rows) == count and {row["split"] for row in rows} == {"train", "val"}
    boxes = {split: json.loads((folder / f"annotations/{split}.json").read_text()) for split in ("train", "val")}
    for index, row in enumerate(rows):
        scene = generate_scene(5, index, (96, 128))
        assert row["label"] == scene.scene_class and row["file"].startswith(f"images/{row['split']}/")
        assert np.array_equal(np.asarray(Image.open(folder / row["file"])), scene.image)
        mask = np.asarray(Image.open(folder / row["file"].replace("images", "class_masks")))
        assert np.array_equal(mask, scene.class_mask)
        targets = np.asarray(Image.open(folder / row["file"].replace("images", "target_masks")))
        assert np.array_equal(targets, scene.target_mask.astype(np.uint8) * 255)
        coco = boxes[row["split"]]
        (image,) = [entry for entry in coco["images"] if row["file"].endswith(entry["file_name"])]
        assert (image["width"], image["height"]) == (128, 96)
        names = {entry["id"]: entry["name"] for entry in coco["categories"]}
        found = [(names[a["category_id"]], *a["bbox"]) for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert found == [(name, x0, y0, x1 - x0, y1 - y0) for name, (x0, y0, x1, y1), _ in boxes_of(scene)]
    for coco in boxes.values():
        assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_split_keeps_classes_balanced(fraction):
    chosen = np.array([is_val(index, fraction) for index in range(100 * CLASSES)]).reshape(100, CLASSES)
    assert np.array_equal(chosen.sum(axis=0), np.full(CLASSES, round(100 * fraction)))


def test_output_must_be_empty_and_failure_leaves_nothing(tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder"):
        write_dataset(full, 2, size=(64, 64))
    empty = tmp_path / "empty"
    empty.mkdir()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_module, "_annotate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(empty, 2, size=(64, 64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
    assert not any(empty.iterdir()) and (full / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 1, "val_fraction": 1.5}, {"count": 1, "size": (32, 64)},
                                   {"count": 1, "seed": -1}])  # fmt: skip
def test_bad_arguments_are_one_line(tmp_path, wrong):
    with pytest.raises(InputError) as caught:
        write_dataset(tmp_path / "out", **wrong)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command_is_reproducible_and_refuses_to_overwrite(tmp_path):
    def contents(name):
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}

    command = [sys.executable, "-m", "data_pipelines.synthetic", f"--output={tmp_path / 'a'}", "--count=6", "--seed=2",
               "--height=64", "--width=96"]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert first.returncode == 0, first.stderr
    write_dataset(tmp_path / "b", 6, 2, (64, 96))
    assert contents("a") == contents("b") and len(contents("a")) == 3 * 6 + 4
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not an empty folder" in again.stderr
    assert contents("a") == contents("b")
