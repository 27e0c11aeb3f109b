"""Labelled samples and evaluation batches: nothing lost, nothing twice, nothing cut."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.batches import DamagedShards
from data_pipelines.errors import InputError
from data_pipelines.examples import Objects, decode_pixels
from data_pipelines.masking import MaskConfig
from data_pipelines.pipeline import PipelineConfig, eval_batches, pretrain_view, train_batches
from data_pipelines.reader import ExampleReader
from data_pipelines.transforms import PAD_GRAY, InfraredAugment, center_crop_resize
from data_pipelines.views import LabelledView
from tests.data_pipelines.shard_sets import make_example, make_image, truncated, write_splits

COUNT = 11


def labelled(index):
    """An image with a bright box, the mask and the box of it, and its number as label."""
    image, mask = make_image(index), np.zeros((60, 80), np.uint8)
    top, left = 5 + 2 * index, 10 + 3 * index
    mask[top : top + 12, left : left + 20] = 1 + index % 3
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    boxes = np.array([[left, top, left + 20, top + 12]] * (1 + index % 2), np.float32)
    count = len(boxes)
    classes, areas = np.full(count, index % 3, np.int32), np.full(count, 240, np.float32)
    objects = Objects(boxes, classes, np.zeros(count, bool), areas)
    example = make_example(f"image{index:02d}", np.where(mask, np.uint8(250), image), "png")
    return dataclasses.replace(example, mask=buffer.getvalue(), objects=objects, labels={"label": index, "fold": 7})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    splits = {"train": [labelled(i) for i in range(COUNT)], "val": [labelled(i) for i in range(5)]}
    return write_splits(tmp_path_factory.mktemp("data") / "set", splits, shards=2)


def _config(*shards, **changes):
    return PipelineConfig(**({"shards": shards, "batch_size": 4, "image_size": (32, 48), "threads": 0} | changes))


VIEW = LabelledView((32, 48), "fit", mask=True, max_objects=3, labels=("label", "fold"))


@settings(deadline=None, max_examples=10)
@given(hosts=st.integers(1, 5), per_host=st.integers(1, 7))
def test_hosts_together_give_every_example_once_in_order(shards, hosts, per_host):
    reader = ExampleReader([shards])
    seen, counts = [], set()
    for host in range(hosts):
        with eval_batches(_config(shards, batch_size=hosts * per_host), "train", VIEW, host, hosts) as batches:
            given_out = list(batches)
        counts.add(len(given_out))
        assert len(given_out) == len(batches)
        for batch in given_out:
            assert batch["valid"].shape == (per_host,) and (batch["index"][~batch["valid"]] == -1).all()
            assert not batch["image"][~batch["valid"]].any()
            seen += zip(batch["index"][batch["valid"]].tolist(), batch["label"][batch["valid"]].tolist(), strict=True)
    assert len(counts) == 1
    assert seen == [(index, reader[index].labels["label"]) for index in range(COUNT)]


def test_workers_and_threads_change_nothing(shards):
    ways = [{}, {"threads": 2}, {"workers": 2}]
    for make in (
        lambda config: eval_batches(config, "val", VIEW),
        lambda config: train_batches(config, 3, view=dataclasses.replace(VIEW, whole="")),
    ):
        first = None
        for changes in ways:
            with make(_config(shards, **changes)) as batches:
                got = [batch for _, batch in zip(range(4), batches, strict=False)]
            first = first or got
            assert len(got) == len(first) > 1
            for ours, theirs in zip(got, first, strict=True):
                assert set(ours) == set(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_labels_move_with_the_image(shards):
    view = dataclasses.replace(VIEW, whole="", flip=True)
    with train_batches(_config(shards, batch_size=16), view=view) as batches:
        batch = next(batches)
    spec = {name: (array.shape[1:], array.dtype) for name, array in batch.items()}
    assert spec == {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in view.spec.items()}
    arrays = (batch[name] for name in ("image", "mask", "boxes", "box_valid"))
    for image, mask, boxes, valid in zip(*arrays, strict=True):
        if (mask > 0).sum() > 60:
            assert image[mask > 0].mean() > 230  # the bright box is where the mask is
            rows, columns = np.nonzero(mask)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(boxes[0], extent, atol=1.0)
            assert valid[0] and not boxes[~valid].any()


def test_boxes_of_small_images_have_their_padding_behind_them_also_mirrored(shards):
    """Sizes say what of the canvas is image; outlines are the object itself, here all of its box."""
    view = LabelledView((96, 128), zoom=(1.0, 1.0), flip=True, augment=InfraredAugment(), max_objects=3, outlines=8)
    with train_batches(_config(shards, batch_size=16, image_size=(96, 128)), view=view) as batches:
        batch = next(batches)
    assert (batch["size"] == [60, 80]).all() and batch["outlines"].dtype == np.uint8
    images, reader = batch["image"][..., 0], ExampleReader([shards])
    stored = [decode_pixels(reader[index]) for index in range(COUNT)]
    assert (images[:, 60:] == PAD_GRAY).all() and (images[:, :, 80:] == PAD_GRAY).all()
    mirrored = 0
    arrays = (batch[name] for name in ("boxes", "box_valid", "outlines"))
    for image, boxes, valid, outlines in zip(images, *arrays, strict=True):
        (found,) = [x for x in (*stored, *(x[:, ::-1] for x in stored)) if (x == image[:60, :80]).all()]
        mirrored += not any((x == found).all() for x in stored)
        for (x0, y0, x1, y1), outline in zip(boxes[valid].astype(int), outlines[valid], strict=True):
            assert (image[y0:y1, x0:x1] == 250).all() and outline.all()
        assert not outlines[~valid].any()
    assert 2 < mirrored < 14


def test_crops_are_drawn_around_objects_of_every_class_alike(tmp_path):
    """One object of a rare class among many of another: half of the crops that are asked for show it."""
    boxes = np.array([[2, 2, 6, 6]] * 9 + [[150, 90, 154, 94]], np.float32)
    objects = Objects(boxes, np.array([0] * 9 + [1], np.int32), np.zeros(10, bool), np.full(10, 16, np.float32))
    example = dataclasses.replace(make_example("one", make_image(0, 100, 160), "png"), objects=objects)
    folder = write_splits(tmp_path / "set", {"train": [example]}, shards=1)
    view = LabelledView((32, 32), zoom=(1.0, 1.0), focus=1.0, max_objects=10)
    with train_batches(_config(folder, batch_size=64, image_size=(32, 32)), view=view) as batches:
        batch = next(batches)
    shown = [set(classes[valid].tolist()) for classes, valid in zip(batch["classes"], batch["box_valid"], strict=True)]
    assert all(shown) and 16 < sum(1 in each for each in shown) < 48


def test_more_objects_than_declared_are_an_error_that_names_the_image(shards):
    view = dataclasses.replace(VIEW, max_objects=1)
    with (
        eval_batches(_config(shards), "train", view) as batches,
        pytest.raises(InputError, match="image01 shows 2") as caught,
    ):
        list(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["mask", "objects"])
def test_an_example_without_the_label_is_named(tmp_path, missing):
    folder = write_splits(tmp_path / "set", {"train": [dataclasses.replace(labelled(0), **{missing: None})]}, shards=1)
    with eval_batches(_config(folder), "train", VIEW) as batches, pytest.raises(InputError, match="image00 has no"):
        next(batches)


def test_damaged_examples_are_errors_or_left_out_and_counted(tmp_path):
    examples = [truncated(labelled(i)) if i == 2 else labelled(i) for i in range(6)]
    folder = write_splits(tmp_path / "set", {"train": examples}, shards=1)
    batches = eval_batches(_config(folder), "train", VIEW)
    with batches, pytest.raises(DamagedShards, match="record 2: image02"):
        list(batches)
    with eval_batches(_config(folder, max_corrupt=0.2), "train", VIEW) as batches:
        valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.tolist() == [True, True, False, True, True, True, False, False] and batches.damaged == 1


def test_pretraining_can_be_evaluated(shards):
    config = _config(shards, mask=MaskConfig(score="none", selection="random"))
    with eval_batches(config, "val", pretrain_view(config, centered=True)) as batches:
        first, second = next(batches), next(batches)
    reader = ExampleReader([shards], "val")
    for place, index in enumerate(first["index"]):
        expected = center_crop_resize(decode_pixels(reader[int(index)]), (32, 48))
        np.testing.assert_array_equal(first["image"][place, ..., 0], expected)
    assert second["valid"].tolist() == [True, False, False, False] and second["ids_keep"].shape == (4, 2)


def test_too_little_shared_memory_is_one_line(shards, monkeypatch):
    monkeypatch.setattr("data_pipelines.batches._free_shared_memory", lambda: 10_000)
    with pytest.raises(InputError, match=r"/dev/shm.*0.01 MB free.*data.prefetch=4 or data.workers=2") as caught:
        train_batches(_config(shards, workers=2))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"whole": "side"}, {"focus": 2.0}])
def test_unusable_views_are_named(changes):
    with pytest.raises(InputError, match=str(next(iter(changes.values())))):
        LabelledView((32, 32), **changes)
