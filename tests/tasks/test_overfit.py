"""With --long: heads learn a handful of images by heart, through the loop that trains."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.decode import encode_png
from data_pipelines.examples import Objects
from data_pipelines.synthetic import write_shards
from data_pipelines.transforms import InfraredAugment
from infmae_jax.models.config import DetectionHeadConfig, SegmentationHeadConfig, SmallTargetHeadConfig
from infmae_jax.training import loop
from tests.data_pipelines.shard_sets import make_example, write_splits
from tests.tasks.cases import task_of

SIDE = 96


@pytest.fixture(autouse=True)
def only_with_long(request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: --long")


def provinces(seed, classes=6):
    """An image whose classes differ in gray value and stripes, and its mask: the cells around a point for each class.

    The heads answer every 4 pixels. Regions this large can be told apart at that stride; of the synthetic scenes at
    this size, with persons of 10 pixels, no such head can reach a mIoU above 0.81.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    points = rng.uniform(0, SIDE, (2, classes, 1, 1))
    mask = np.argmin((rows - points[0]) ** 2 + (columns - points[1]) ** 2, axis=0).astype(np.uint8)
    stripes = 20 * np.sin(2 * np.pi * (rows + columns * (mask % 2)) / (4 + mask))
    return np.clip(40 + 30 * mask + stripes + rng.normal(0, 6, mask.shape), 0, 255).astype(np.uint8), mask


def test_segmentation_of_eight_images(encoder, tmp_path):
    drawn = [provinces(seed) for seed in range(8)]
    examples = [
        dataclasses.replace(make_example(f"image{i}", image, "png"), mask=encode_png(mask))
        for i, (image, mask) in enumerate(drawn)
    ]
    classes = {"mask": [f"province {i}" for i in range(6)]}
    write_splits(tmp_path / "surfaces", {"train": examples, "val": examples}, classes=classes)
    head = SegmentationHeadConfig(channels=48, auxiliary_channels=16, dropout=0.0)
    scores = learned("segment", encoder, tmp_path, head, steps=300)
    assert scores["images"] == 8 and scores["mIoU"] > 0.95


def test_small_targets_of_sixteen_images(encoder, tmp_path):
    write_shards(tmp_path / "targets", 22, size=(SIDE, SIDE), mask="targets")  # some of them are val
    head = SmallTargetHeadConfig(widths=(32, 24, 16, 16, 16))
    scores = learned("small_target", encoder, tmp_path, head, steps=900)
    assert scores["images"] == 16 and scores["IoU"] > 0.9


def warm_things(seed, classes=2):
    """An image, boxes and classes of four things in its quarters: plain discs (0) and striped rectangles (1)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    image, boxes, kinds = rng.normal(60, 6, (SIDE, SIDE)), [], rng.integers(0, classes, 4)
    for quarter, kind in enumerate(kinds):
        height, width = rng.uniform(12, 36, 2) if kind else rng.uniform(12, 36, (1,)).repeat(2)
        y, x = rng.uniform(0, 48 - np.array([height, width])) + 48 * np.array(divmod(quarter, 2))
        down, along = (rows + 0.5 - y) / height, (columns + 0.5 - x) / width
        inside = (abs(down - 0.5) < 0.5) & (abs(along - 0.5) < 0.5) if kind else np.hypot(down - 0.5, along - 0.5) < 0.5
        image[inside] = 170 + (60 * np.sin(columns[inside]) if kind else 0)
        boxes.append((x, y, x + width, y + height))
    return image.clip(0, 255).astype(np.uint8), np.array(boxes, np.float32), kinds.astype(np.int32)


def test_detection_of_eight_images(encoder, tmp_path):
    examples = []
    for seed in range(8):
        image, boxes, classes = warm_things(seed)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        objects = Objects(boxes, classes, np.zeros(len(boxes), bool), areas)
        examples.append(dataclasses.replace(make_example(f"image{seed}", image, "png"), objects=objects))
    write_splits(tmp_path / "boxes", {"train": examples, "val": examples}, classes={"objects": ["disc", "rectangle"]})
    head = DetectionHeadConfig(
        channels=32, box_channels=64, box_convs=1, pre_nms_train=200, pre_nms_test=200, proposals_train=100,
        proposals_test=100, rois=64,
    )  # fmt: skip
    scores = learned("detect", encoder, tmp_path, head, steps=300)
    assert scores["images"] == 8 and scores["AP50"] > 0.95


def learned(kind, encoder, folder, head, steps):
    """Scores on the training images themselves."""
    exact = dict(
        image_size=(SIDE, SIDE), batch_size=8, zoom=(1.0, 1.0), focus=0.0, flip=False, augment=InfraredAugment()
    )
    task, config = task_of(
        kind, encoder, folder, data=exact, duration=f"{steps} steps", head=head, layer_decay=1.0,
        log_every="20 steps", evaluate_every="0 steps", checkpoint_every="0 steps",
    )  # fmt: skip
    optimizer = dataclasses.replace(
        config.optimizer, base_learning_rate=0.1, warmup="20 steps", weight_decay=0.0, clip_norm=0.1
    )
    config = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, drop_path=0.0), optimizer=optimizer
    )
    task = type(task)(config, task.trained)
    params = jax.device_get(loop.train(task, config, folder / "run").state.params)
    return task.model.evaluate(params, config.data.shards, "train")["scores"]
