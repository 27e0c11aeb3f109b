"""Masks in the layouts of public data sets, made up here: what is stored, how it is split, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.builders.build import build
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_mask, decode_pixels
from tests.data_pipelines.shard_sets import counts, notes
from tests.data_pipelines.test_builders import records


def _files(folder, names, values, mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32), np.uint8) if values is None else values
        Image.fromarray(pixels.astype(np.uint8), mode).save(folder / f"{name}.png")


MASK = np.zeros((24, 32), np.uint8)
MASK[5:9, 7:12] = 1
NAMES = [f"{n:05d}N" for n in range(10)]


@pytest.mark.parametrize("layout", ["msrs", "pst900", "voc", "mfnet", "flat"])
def test_class_masks_in_the_layouts_of_public_sets(tmp_path, layout):
    root = tmp_path / "in"
    train, val = NAMES[:7], NAMES[7:]
    images, masks = {
        "msrs": ("ir", "Segmentation_labels"), "pst900": ("thermal", "labels"), "mfnet": ("images", "labels"),
        "voc": ("JPEGImages", "SegmentationClassPNG"), "flat": ("images", "masks"),
    }[layout]  # fmt: skip
    if layout in ("msrs", "pst900"):
        for split, names in (("train", train), ("test", val)):
            _files(root / split / images, names, None)
            _files(root / split / masks, names, MASK)
    else:
        _files(root / images, NAMES, None)
        _files(root / masks, NAMES, MASK)
        if layout != "flat":
            suffix = "_infrared" if layout == "voc" else ""
            (root / f"train{suffix}.txt").write_text("\n".join(train) + "\n")
            (root / f"test{suffix}.txt").write_text("\n".join(val))
            (root / "train.txt").write_text("\n".join(train))
    if layout == "mfnet":
        for name in NAMES:
            with Image.open(root / images / f"{name}.png") as thermal:
                colours = [thermal.point(lambda value, n=n: (value + 50 * n) % 256) for n in (1, 2, 3)]
                Image.merge("RGBA", [*colours, thermal]).save(root / images / f"{name}.png")
    classes = [{"value": 0, "name": "none"}, {"value": 1, "name": "car"}]
    (root / "classes.json").write_text(json.dumps({"classes": classes, "ignore": 255}))
    built = build("class_masks", tmp_path / "data", root)
    second = "val" if layout == "flat" else "test"
    assert counts(built) == ({"train": 8, "val": 2} if layout == "flat" else {"train": 7, second: 3})
    for key, example in records(built, "train").items():
        assert np.array_equal(decode_mask(example), MASK)
        number = NAMES.index(key.split("/")[-1].removesuffix(".png"))
        expected = np.random.default_rng(number).integers(0, 256, (24, 32), np.uint8)
        assert np.array_equal(decode_pixels(example), expected)
    if layout == "mfnet":
        assert notes(built) == {"thermal images taken from the fourth channel": 10}


def test_coloured_masks_are_translated_by_the_table_or_refused(tmp_path):
    root = tmp_path / "in"
    _files(root / "images" / "train", NAMES[:2], None)
    colours = np.array([(0, 0, 0), (64, 0, 128)], np.uint8)[MASK]
    _files(root / "masks" / "train", NAMES[:2], colours, "RGB")
    table = [{"value": 0, "name": "none"}, {"value": 1, "name": "car"}]
    (root / "classes.json").write_text(json.dumps({"classes": table, "ignore": 255}))
    with pytest.raises(InputError, match='give every class its "color"'):
        build("class_masks", tmp_path / "a", root)
    table[0]["color"], table[1]["color"] = [0, 0, 0], [64, 0, 129]
    (root / "classes.json").write_text(json.dumps({"classes": table, "ignore": 255}))
    with pytest.raises(InputError, match=r"holds the colour \[64, 0, 128\]"):
        build("class_masks", tmp_path / "b", root)
    table[1]["color"] = [64, 0, 128]
    (root / "classes.json").write_text(json.dumps({"classes": table, "ignore": 255}))
    built = build("class_masks", tmp_path / "c", root)
    assert all(np.array_equal(decode_mask(example), MASK) for example in records(built, "train").values())
    assert notes(built) == {"masks translated from colours": 2}


@pytest.mark.parametrize("layout", ["sirst", "sirst2", "irstd1k", "nudt"])
def test_small_targets_in_the_layouts_of_public_sets(tmp_path, layout):
    root = tmp_path / "in"
    images, masks, suffix = {
        "sirst": ("images", "masks", "_pixels0"), "sirst2": ("images/targets", "annotations/masks", "_pixels0"),
        "irstd1k": ("IRSTD1k_Img", "IRSTD1k_Label", ""), "nudt": ("images", "masks", ""),
    }[layout]  # fmt: skip
    _files(root / images, NAMES, None)
    _files(root / masks, [name + suffix for name in NAMES], MASK * 255)
    Image.fromarray(MASK * np.uint8(200) + np.uint8(30)).save(root / masks / f"{NAMES[0]}{suffix}.png")  # not binary
    Image.fromarray(0 * MASK).save(root / masks / f"{NAMES[1]}{suffix}.png")  # a background
    Image.fromarray(np.stack([MASK * np.uint8(255)] * 3, axis=-1)).save(root / masks / f"{NAMES[2]}{suffix}.png")
    (root / "img_idx").mkdir()
    if layout != "irstd1k":
        (root / "img_idx" / f"train_{layout}.txt").write_text("\n".join(NAMES[:8]))
        (root / "img_idx" / f"test_{layout}.txt").write_text("\n".join(NAMES[8:]))
    built = build("small_targets", tmp_path / "data", root)
    assert counts(built) == {"train": 8, "val" if layout == "irstd1k" else "test": 2}
    assert notes(built) == {"masks with values between 0 and 255, cut at 127": 1}
    for key, example in records(built, "train").items():
        assert np.array_equal(decode_mask(example), MASK * 0 if NAMES[1] in key else MASK)


def test_an_image_without_mask_and_unknown_layouts_are_one_line(tmp_path):
    root = tmp_path / "in"
    _files(root / "images" / "train", NAMES[:3], None)
    _files(root / "masks" / "train", NAMES[:2], MASK)
    with pytest.raises(InputError, match="has no mask of the same stem"):
        build("small_targets", tmp_path / "a", root)
    (root / "masks").rename(root / "ground truth")
    with pytest.raises(InputError, match="known layout"):
        build("small_targets", tmp_path / "b", root)


def test_an_image_in_two_lists_is_refused(tmp_path):
    root = tmp_path / "in"
    _files(root / "images", NAMES, None)
    _files(root / "masks", NAMES, MASK)
    (root / "trainval.txt").write_text("\n".join(NAMES[:8]))
    (root / "val.txt").write_text("\n".join(NAMES[6:]))
    with pytest.raises(InputError, match=f"{NAMES[6]} is in train and val"):
        build("small_targets", tmp_path / "data", root)


def _boxes(path, boxes, crowd=()):
    """A COCO file of 32x24 images; `boxes`: one list for each name of NAMES."""
    images = [{"id": n, "file_name": f"{NAMES[n]}.png", "width": 32, "height": 24} for n in range(len(boxes))]
    annotations = [
        {"id": f"{n}/{k}", "image_id": n, "category_id": 1 + k % 2, "bbox": box, "iscrowd": int((n, k) in crowd)}
        for n, found in enumerate(boxes) for k, box in enumerate(found)
    ]  # fmt: skip
    categories = [{"id": 1, "name": "drone"}, {"id": 2, "name": "bird"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def test_boxes_become_weak_masks_that_say_so(tmp_path):
    root = tmp_path / "in"
    boxes = [[[3.5, 4.25, 11, 7.5]], [], [[10.1, 10.1, 0.3, 0.2]], [[-4, 2, 10, 6], [20, 5, 6, 6]], [[40, 2, 3, 3]]]
    for split in ("train", "val"):
        _files(root / "images" / split, NAMES[:5], None)
        _boxes(root / "annotations" / f"{split}.json", boxes, crowd={(3, 1)})
    built = build("weak_small_targets", tmp_path / "data", root)
    assert counts(built) == {"train": 5, "val": 5}
    assert notes(built) == {
        "targets drawn from boxes as filled ellipses (weak masks)": 2 * 3, "crowd boxes that do not count (ignored)": 2,
        "boxes left out (empty or outside the image)": 2, "images of val whose pixels are in train too": 5,
    }  # fmt: skip
    found = [decode_mask(example) for _, example in sorted(records(built, "train").items())]
    for (x, y, width, height), label, mask in (
        (boxes[0][0], 1, found[0]), (boxes[3][0], 1, found[3]), (boxes[3][1], 255, found[3])
    ):  # fmt: skip
        for row in range(24):
            for column in range(32):
                apart = ((column + 0.5 - x) / width - 0.5) ** 2 + ((row + 0.5 - y) / height - 0.5) ** 2
                assert (mask[row, column] == label) == (apart <= 0.25), (row, column)
    assert not found[1].any() and not found[4].any()  # backgrounds stay
    assert found[2].sum() == 1 and found[2][10, 10] == 1  # no target vanishes


def test_boxes_of_one_file_are_split_in_blocks(tmp_path):
    root = tmp_path / "in"
    _files(root / "images", NAMES, None)
    _boxes(root / "annotations.json", [[[2, 2, 5, 5]]] * 10)
    built = build("weak_small_targets", tmp_path / "data", root)
    assert counts(built) == {"train": 8, "val": 2}
    assert set(records(built, "val")) == {f"images/{name}.png" for name in NAMES[8:]}
    boxes = build("coco_boxes", tmp_path / "boxes", root)
    assert counts(boxes) == counts(built) and set(records(boxes, "val")) == set(records(built, "val"))


def test_masks_of_small_targets_that_are_odd(tmp_path):
    """Values 0, 64 and 255: cut at 127 and counted; all black: a background; another size: one line."""
    root = tmp_path / "in"
    _files(root / "images" / "train", NAMES[:2], None)
    _files(root / "masks" / "train", NAMES[:2], 0 * MASK)
    levels = np.where(MASK, 255, 0).astype(np.uint8)
    levels[0] = 64
    Image.fromarray(levels).save(root / "masks" / "train" / f"{NAMES[0]}.png")
    built = build("small_targets", tmp_path / "data", root)
    first, second = (decode_mask(example) for _, example in sorted(records(built, "train").items()))
    assert np.array_equal(first, MASK) and not second.any()
    assert notes(built) == {"masks with values between 0 and 255, cut at 127": 1}
    Image.fromarray(levels[:20]).save(root / "masks" / "train" / f"{NAMES[1]}.png")
    with pytest.raises(InputError, match=f"{NAMES[1]}.png is 32x20, its image 32x24: make them equal$"):
        build("small_targets", tmp_path / "other", root)


def test_a_class_number_outside_of_nine_and_no_masks_at_all(tmp_path):
    root = tmp_path / "in"
    _files(root / "images" / "train", NAMES[:2], None)
    (root / "classes.json").write_text(json.dumps({"classes": [{"value": n, "name": f"c{n}"} for n in range(9)]}))
    with pytest.raises(InputError, match="has no images with masks in a known layout"):
        build("class_masks", tmp_path / "a", root)
    _files(root / "masks" / "train", NAMES[:2], MASK)
    Image.fromarray(np.where(MASK, 200, 8).astype(np.uint8)).save(root / "masks" / "train" / f"{NAMES[1]}.png")
    with pytest.raises(InputError, match=f"{NAMES[1]}.png holds the value 200, which classes.json does not list$"):
        build("class_masks", tmp_path / "b", root)
