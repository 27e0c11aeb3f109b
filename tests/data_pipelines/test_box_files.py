"""Boxes as COCO, VOC and YOLO files hold them: the same boxes in all three, every mistake in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.builders.box_files import read_boxes
from data_pipelines.builders.build import build
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example, decode_mask
from data_pipelines.shards import ShardReader, read_manifest
from tests.data_pipelines.shard_sets import counts, notes

SIZES = {"a": (30, 40), "b": (32, 48), "c": (30, 40), "d": (30, 40), "e": (30, 40)}  # rows, columns
BOXES = {"a": [("Car", 4, 3, 14, 13), ("People", 0, 0, 5, 9)], "b": [("Bus", 10, 8, 40, 31)], "c": [], "d": [],
         "e": [("Car", 1, 1, 3, 3)]}  # fmt: skip


def image(path, size, exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = Image.Exif()
    if exif:
        tags[0x0112] = exif
    pixels = np.random.default_rng(list(path.stem.encode())).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=tags)


def voc(root, labels="Annotations", images="JPEGImages", names=BOXES):
    for name in names:
        image(root / images / f"{name}.png", SIZES[name])
        (root / labels).mkdir(exist_ok=True)
        rows = "".join(
            f"<object><name>{kind}</name><difficult>{int(kind == 'Bus')}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}"
            f"</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for kind, x0, y0, x1, y1 in BOXES[name]
        )
        height, width = SIZES[name]
        size = f"<size><width>{width}</width><height>{height}</height><depth>1</depth></size>"
        (root / labels / f"{name}.xml").write_text(f"<annotation>{size}{rows}</annotation>")
    return root


def yolo(root, kinds=("Car", "People", "Bus"), layout="{kind}/{split}", split=""):
    for name, found in BOXES.items():
        height, width = SIZES[name]
        part = split or ("val" if name == "e" else "train")
        image(root / layout.format(kind="images", split=part) / f"{name}.png", SIZES[name])
        labels = root / layout.format(kind="labels", split=part)
        labels.mkdir(parents=True, exist_ok=True)
        rows = [
            (kinds.index(kind), (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            for kind, x0, y0, x1, y1 in found
        ]
        if name != "d":  # without a file: no boxes
            (labels / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    (root / "classes.txt").write_text("\n".join(kinds) + "\n")
    return root


def stored(folder, split):
    names = read_manifest(folder).classes["objects"]
    return {
        Path(e.key).stem: sorted(
            (names[number], *np.round(box, 3).tolist())
            for number, box in zip(e.objects.classes, e.objects.boxes, strict=True)
        )
        for e in map(decode_example, ShardReader(folder, split))
    }


def test_weak_masks_come_from_boxes_in_any_format(tmp_path):
    built = build("weak_small_targets", tmp_path / "data", yolo(tmp_path / "set"))
    masks = {Path(e.key).stem: decode_mask(e) for e in map(decode_example, ShardReader(built))}
    assert masks["a"][8, 9] == masks["b"][19, 25] == 1 and not masks["c"].any()


def test_a_folder_of_no_images_is_one_line(tmp_path):
    root = yolo(tmp_path / "set", layout="{kind}")
    for path in (root / "images").iterdir():
        path.rename(tmp_path / path.name)
    for path in (root / "labels").iterdir():
        path.write_text("") if path.name == "classes.txt" else path.unlink()
    (root / "labels" / "classes.txt").write_text("Car\n")
    with pytest.raises(InputError, match="has no images with boxes"):
        build("coco_boxes", tmp_path / "data", root)


def test_m3fd_is_read_whole_and_split_in_blocks(tmp_path):
    root = voc(tmp_path / "M3FD", labels="Annotation", images="Ir")
    image(root / "Vis" / "a.png", (30, 40))
    built = build("coco_boxes", tmp_path / "data", root)
    assert counts(built) == {"train": 4, "val": 1} and notes(built) == {"images without boxes": 2}
    assert {**stored(built, "train"), **stored(built, "val")} == {k: sorted(v) for k, v in BOXES.items()}
    manifest = read_manifest(built)
    assert manifest.settings["split"].startswith("no lists of splits: the first 4 images by name are train")
    assert manifest.settings["category_ids"] == {"Bus": 1, "Car": 2, "People": 3}
    assert manifest.sizes == {"40x30": 4, "48x32": 1}
    crowds = {e.key: e.objects.crowd.tolist() for e in map(decode_example, ShardReader(built))}
    assert crowds["Ir/b.png"] == [True] and crowds["Ir/a.png"] == [False, False]


def test_voc_lists_of_names_are_the_splits(tmp_path):
    root = voc(tmp_path / "set")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "test.txt").write_text("b\n")
    splits, note = read_boxes(root)
    assert not note
    found = {name: [image.file_name for image in split.images] for name, split in splits.items()}
    assert found == {"train": ["a.png", "c.png"], "test": ["b.png"]}


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}"])
def test_yolo_boxes_are_those_of_voc(tmp_path, layout):
    built = build("coco_boxes", tmp_path / "data", yolo(tmp_path / "set", layout=layout))
    assert counts(built) == {"train": 4, "val": 1} and notes(built) == {"images without boxes": 2}
    assert {**stored(built, "train"), **stored(built, "val")} == {k: sorted(v) for k, v in BOXES.items()}
    assert read_manifest(built).settings["category_ids"] == {"Car": 0, "People": 1, "Bus": 2}


@pytest.mark.parametrize("names", ["names: [Car, People, Bus]", "names:\n  0: Car\n  1: People\n  2: Bus",
                                   "nc: 3\nnames:\n- Car\n- People\n- Bus"])  # fmt: skip
def test_yolo_classes_come_from_yaml_too(tmp_path, names):
    root = yolo(tmp_path / "set")
    (root / "classes.txt").unlink()
    (root / "dataset.yaml").write_text(f"path: .\ntrain: images/train\n{names}\n")
    splits, _ = read_boxes(root)
    assert splits["train"].categories == {"Car": 0, "People": 1, "Bus": 2}


def test_yolo_polygons_are_outlines(tmp_path):
    root = yolo(tmp_path / "set")
    (root / "labels/train/a.txt").write_text("1 0.25 0.5 0.5 0.5 0.5 1.0\n")
    splits, _ = read_boxes(root)
    (found,) = splits["train"].images[0].annotations
    assert found.segmentation == [[10, 15, 20, 15, 20, 30]] and found.bbox == (10, 15, 10, 15)


def spoil_voc(root, what):
    path = root / "Annotations" / "a.xml"
    text = path.read_text()
    if what == "swapped":
        path.write_text(text.replace("<xmax>14</xmax>", "<xmax>2</xmax>"))
    elif what == "text":
        path.write_text(text.replace("<ymax>13</ymax>", "<ymax>many</ymax>"))
    elif what == "missing":
        path.unlink()
    elif what == "unnamed":
        path.write_text(text.replace("<name>Car</name>", ""))
    elif what == "broken":
        path.write_text(text[:-20])
    elif what == "images":
        (root / "JPEGImages").rename(root / "pictures")


@pytest.mark.parametrize(
    ("what", "message"),
    [("swapped", "object 1 has its second corner 2,13 before its first 4,3.*width"), ("text", "ymax is 'many'"),
     ("missing", "a.png has no .*a.xml: add"), ("unnamed", "object 1 has no name"), ("broken", "not readable as XML"),
     ("images", "no folder of images beside Annotations")],
)  # fmt: skip
def test_mistakes_of_voc_are_one_line(tmp_path, what, message):
    root = voc(tmp_path / "set")
    spoil_voc(root, what)
    with pytest.raises(InputError, match=message) as caught:
        read_boxes(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [("0 12 8 4 4", "line 1 holds 12 8 4 4: YOLO boxes are"), ("7 0.5 0.5 0.1 0.1", "class 7; the list .* has 3"),
     ("0 0.5 0.5 0.1", "is not a class and"), ("car 0.5 0.5 0.1 0.1", "is not a class and"),
     ("0 nan 0.5 0.1 0.1", "shares of the image")],
)  # fmt: skip
def test_mistakes_of_yolo_are_one_line(tmp_path, line, message):
    root = yolo(tmp_path / "set")
    (root / "labels/train/a.txt").write_text(line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_boxes(root)
    assert "\n" not in str(caught.value)


def test_yolo_without_classes_and_turned_images_are_refused(tmp_path):
    root = yolo(tmp_path / "set")
    image(root / "images/train/a.png", (30, 40), exif=6)
    with pytest.raises(InputError, match="a.png decodes to .*not certain"):
        build("coco_boxes", tmp_path / "data", root)
    (root / "classes.txt").unlink()
    with pytest.raises(InputError, match="no list of classes: add classes.txt"):
        read_boxes(root)


def test_images_without_a_folder_of_yolo_labels_are_not_empty_ones(tmp_path):
    root = yolo(tmp_path / "set")
    shutil.copytree(root / "images/val", root / "images/test")
    splits, note = read_boxes(root)
    assert set(splits) == {"train", "val"} and note.endswith(f"no folder of labels for them: {root / 'images/test'}")
    for split in ("train", "val"):
        shutil.move(root / "labels" / split, tmp_path / split)
    (root / "labels/a.txt").write_text("")
    with pytest.raises(InputError, match="images/train has no folder of labels .*: put them there"):
        read_boxes(root)


def test_a_folder_without_boxes_names_the_layouts(tmp_path):
    image(tmp_path / "set/images/a.png", (8, 8))
    with pytest.raises(InputError, match="COCO.*VOC.*YOLO"):
        read_boxes(tmp_path / "set")


def coco(root, boxes, categories=("car",), split="train"):
    image(root / "images" / split / "a.png", (60, 80))
    known = [{"id": number, "name": name} for number, name in enumerate(categories, start=11)]
    annotations = [
        {"id": n, "image_id": 77, "category_id": 11, "bbox": list(box)} for n, box in enumerate(boxes, start=1)
    ]
    content = {"images": [{"id": 77, "file_name": "a.png", "width": 80, "height": 60}], "annotations": annotations}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps({**content, "categories": known}))
    return root


def test_corners_given_as_corner_and_size_are_recognised(tmp_path):
    corners = [(5, 5, 20, 20), (40, 30, 70, 50), (50, 20, 60, 58)]
    with pytest.raises(InputError, match=r"2 of 3 boxes leave .* \[x, y, width, height\], not \[x0, y0, x1, y1\]"):
        read_boxes(coco(tmp_path / "corners", corners))
    # one box that is clipped, among others that cannot be corners, is no such file
    splits, _ = read_boxes(coco(tmp_path / "right", [(5, 5, 20, 20), (40, 30, 70, 50), (50, 20, 10, 10)]))
    assert len(splits["train"].images[0].annotations) == 3


def test_boxes_are_clipped_dropped_and_counted_and_ids_kept(tmp_path):
    boxes = [(70, 50, 20, 20), (79.7, 10, 0.6, 5), (90, 0, 5, 5), (3, 3, 0, 9), (9, 9, -4, 3), (1, 1, 4, 4)]
    built = build("coco_boxes", tmp_path / "data", coco(tmp_path / "set", boxes))
    assert notes(built) == {
        "boxes clipped to their image": 1, "boxes left out (empty or outside the image)": 3,
    }  # fmt: skip
    (example,) = map(decode_example, ShardReader(built))
    np.testing.assert_allclose(example.objects.boxes, [[70, 50, 80, 60], [79.7, 10, 80, 15], [1, 1, 5, 5]], atol=1e-4)
    assert example.attributes["image_id"] == 77
    assert read_manifest(built).settings["category_ids"] == {"car": 11}


def test_a_split_with_other_names_is_refused_with_both(tmp_path):
    root = coco(tmp_path / "set", [(1, 1, 4, 4)], categories=("Car", "Person"))
    coco(root, [(1, 1, 4, 4)], categories=("car", "person"), split="val")
    with pytest.raises(InputError, match=r"split val has boxes of car, which train does not list \(it has Car, Person"):
        build("coco_boxes", tmp_path / "data", root)
