"""Label tables and synthetic scenes as shards: every label arrives, every mistake in a table is one line."""

import os
import resource

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example, decode_mask, decode_pixels
from data_pipelines.prepare import prepare_table
from data_pipelines.shards import ShardReader, read_manifest, verify_shards, write_split
from data_pipelines.synthetic import (
    CATEGORIES,
    SCENE_CLASSES,
    SURFACES,
    generate_scene,
    write_dataset,
    write_shards,
)


@pytest.fixture
def images(tmp_path):
    """Eight images img/0.png … img/7.png."""
    (tmp_path / "img").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "img" / f"{index}.png")
    return tmp_path


def write_table(folder, rows, header="file,split,label"):
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def stored(folder, split):
    return [decode_example(data) for data in ShardReader(folder, split)]


ROWS = [f"img/{index}.png,{'train' if index < 6 else 'val'},{('10', '9', '2')[index % 3]}" for index in range(8)]


@pytest.mark.parametrize("encoding", ["source", "raw"])
def test_images_arrive_with_their_labels_and_splits(images, encoding):
    table = write_table(images, ROWS)
    manifest = prepare_table(table, ["label"], images / "out", encoding=encoding)
    verify_shards(images / "out")
    assert manifest == read_manifest(images / "out")
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 6, "val": 2}
    assert manifest.classes == {"label": ("2", "9", "10")}
    for split, rows in (("train", ROWS[:6]), ("val", ROWS[6:])):
        for example, row in zip(stored(images / "out", split), rows, strict=True):
            file, _, label = row.split(",")
            assert example.key == file and manifest.classes["label"][example.labels["label"]] == label
            np.testing.assert_array_equal(decode_pixels(example), np.asarray(Image.open(images / file)))


def test_several_label_columns_have_their_own_names(images):
    table = write_table(images, [f"{row},{'day' if i % 2 else 'night'}" for i, row in enumerate(ROWS)],
                        "file,split,kind,time")  # fmt: skip
    manifest = prepare_table(table, ["kind", "time"], images / "out")
    assert manifest.classes == {"kind": ("2", "9", "10"), "time": ("day", "night")}
    # Rows 6 and 7: "10", "9" of kind; "night", "day" of time.
    assert [example.labels for example in stored(images / "out", "val")] == [
        {"kind": 2, "time": 1},
        {"kind": 1, "time": 0},
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["img/0,1.png,train,a"], "line 2 has 4 fields, the header 3"),
        (["img/0.png,train"], "line 2 has 2 fields, the header 3"),
        (["img/0.png,train,"], "line 2: column 'label' is empty"),
        (["img/9.png,train,a"], "line 2: no image .*9.png"),
        (["/img/0.png,train,a"], "line 2: /img/0.png is absolute: give paths from the table's folder, /"),
        (["img/0.png,train,a", "img/../img/0.png,val,a"], r"line 3: img/../img/0.png is in line 2 \(split train\) too"),
        (["img/0.png,train,a", "link.png,val,a"], r"line 3: link.png is in line 2 \(split train\) too"),
        (["img/0.png,train,a", "copy.png,val,a"], "line 3: image copy.png of split val has the pixels of img/0.png"),
        (["img/0.png,train,a", "img/0.png,train,b"], r"line 3: img/0.png is in line 2 \(the same split\) too"),
        (["broken.png,train,a"], "broken.png is not usable"),
        (["img/0.png,../x,a"], r"line 2: the split '\.\./x' cannot be a file name"),
        (["img/0.png,a/b,a"], "line 2: the split 'a/b' cannot be a file name"),
        (["img/0.png,train,\x1b[31ma"], r"line 2: \\x1b\[31ma in column 'label' has control characters"),
        (["img/0.png,train," + "x" * 200_000], "not a readable CSV"),
        ([], "has a header but no rows"),
    ],
)
def test_mistakes_in_a_table_name_the_line_and_leave_nothing(images, rows, message):
    os.symlink(images / "img/0.png", images / "link.png")
    (images / "copy.png").write_bytes((images / "img/0.png").read_bytes())
    (images / "broken.png").write_bytes(b"no image")
    before = sorted(images.iterdir())
    table = write_table(images, rows)
    with pytest.raises(InputError, match=message) as caught:
        prepare_table(table, ["label"], images / "out")
    assert "\n" not in str(caught.value) and str(images) in str(caught.value)
    assert sorted(images.iterdir()) == sorted([*before, table])


def test_unusable_requests(images):
    table = write_table(images, ROWS)
    for columns, output, message in (
        ([], "out", "at least one label column"),
        (["colour"], "out", "0 columns 'colour'; they are file, split, label"),
        (["label"], "img", "exists already"),
        (["label"], "labels.csv/x", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_table(table, columns, images / output)
    table.write_bytes("file,split,label\nä.png,train,a\n".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-8"):
        prepare_table(table, ["label"], images / "out")
    table.unlink()
    table.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no regular file"):
        prepare_table(table, ["label"], images / "out")


def test_a_split_does_not_lead_out_of_its_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be a file name"):
        write_split(tmp_path / "set", "../x", [b"a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", ["surfaces", "targets"])
def test_synthetic_shards_hold_all_labels_of_the_scenes(tmp_path, mask):
    manifest = write_shards(tmp_path / "set", 18, seed=4, size=(64, 80), val_fraction=0.34, mask=mask)
    assert manifest.classes["label"] == SCENE_CLASSES and manifest.classes["objects"] == CATEGORIES
    assert manifest.classes["mask"] == (SURFACES if mask == "surfaces" else ("background", "target"))
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 12, "val": 6}
    seen = set()
    for split in ("train", "val"):
        for example in stored(tmp_path / "set", split):
            index = int(example.key.split("/")[-1][:6])
            seen.add(index)
            scene = generate_scene(4, index, (64, 80))
            np.testing.assert_array_equal(decode_pixels(example), scene.image)
            wanted = scene.class_mask if mask == "surfaces" else scene.target_mask
            np.testing.assert_array_equal(decode_mask(example), wanted)
            assert SCENE_CLASSES[example.labels["label"]] == scene.scene_class
            np.testing.assert_allclose(example.objects.boxes, scene.objects.boxes, atol=1e-4)
            np.testing.assert_array_equal(example.objects.classes, scene.objects.classes)
            np.testing.assert_array_equal(example.objects.area, scene.objects.area)
    assert seen == set(range(18))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit of file sizes stands for it: the same error of the same call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for write in (write_shards, write_dataset):
            with pytest.raises(InputError, match="cannot be written .*File too large") as caught:
                write(tmp_path / "set", 6)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
