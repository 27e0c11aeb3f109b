"""Files of boxes and classes from strangers: one line, soon, and never another meaning than the file's."""

import json
import os
import time

import numpy as np
import pytest

from data_pipelines.builders.box_files import read_boxes
from data_pipelines.builders.coco_boxes import Grid, annotated_image
from data_pipelines.builders.coco_file import Annotation, CocoImage, read_coco
from data_pipelines.builders.masks import read_classes
from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample, Example
from data_pipelines.outlines import outline
from tests.data_pipelines.test_box_files import voc, yolo

BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>8</ymax></bndbox>"
ENTITIES = '<!DOCTYPE l [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
)  # fmt: skip


def refused(call, *arguments, message=""):
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and message in str(caught.value)
    assert time.monotonic() - start < 20  # a shared machine; each takes well below a second


def special(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["Annotations/a.xml", "labels/train/a.txt", "annotations/train.json", "classes.json"])
def test_pipes_and_devices_are_not_read(tmp_path, name, kind):
    make = {"Annotations": voc, "labels": yolo}.get(name.split("/")[0], lambda root: root)
    root = make(tmp_path)
    (root / name).parent.mkdir(exist_ok=True)
    (root / "images/train").mkdir(parents=True, exist_ok=True)
    special(root / name, kind)
    refused(read_classes if name == "classes.json" else read_boxes, root / name if "classes" in name else root)


def test_pipes_in_place_of_images_are_not_read(tmp_path):
    special(tmp_path / "a.png", "pipe")
    refused(annotated_image, CocoImage("a.png", None, []), tmp_path, 8, message="no regular file")


@pytest.mark.parametrize("content", [
    *(f'<?xml version="1.0" encoding="{name}"?><annotation/>' for name in ("foo", "utf-7", "hex", "idna", "shift_jis")),
    ENTITIES + "]><annotation><object><name>&j;</name></object></annotation>",
    "<html><object/></html>", '<annotation xmlns="http://x"/>',
    "<annotation><object><name>a</name>" + BOX.format("1e308") + "</object></annotation>",
    "<annotation><object><name>a&#10;b</name>" + BOX.format(9) + "</object></annotation>",
    "<annotation>" + " " * (5 << 20) + "</annotation>",
])  # fmt: skip
def test_xml(tmp_path, content):
    root = voc(tmp_path)
    (root / "Annotations" / "a.xml").write_text(content)
    refused(read_boxes, root, message="Annotations")


@pytest.mark.parametrize("make, name", [(voc, "Annotations/z.xml"), (yolo, "labels/train/z.txt")])
def test_labels_without_image_are_not_lost_unsaid(tmp_path, make, name):
    root = make(tmp_path)
    (root / name).write_text("")
    refused(read_boxes, root, message="have no image")


def test_images_of_one_stem_and_lists_are_checked(tmp_path):
    root = voc(tmp_path)
    (root / "ImageSets").mkdir()
    for content, message in ((b"", "lists no image"), (b"\xff\n", "no text in UTF-8")):
        (root / "ImageSets" / "train.txt").write_bytes(content)
        refused(read_boxes, root, message=message)
    (root / "ImageSets" / "train.txt").write_text("a\na\nb\n")
    assert [image.file_name for image in read_boxes(root)[0]["train"].images] == ["a.png", "b.png"]
    (root / "JPEGImages" / "a.bmp").write_bytes((root / "JPEGImages" / "a.png").read_bytes())
    refused(read_boxes, root, message="one stem")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
)


@pytest.mark.parametrize("text, names", [
    ("names: [yes, no, 2001-99-99]", ["yes", "no", "2001-99-99"]),
    ("names: {1: b, 0: a, '2': 1:30}", ["a", "b", "1:30"]),
    ("x: !!int ''\nnames: [1.0, 0x1, ~]", ["1.0", "0x1", "~"]),
    ("names: abc", None), (BOMB + "names: [*i, b, c]", None), ("names: &a [*a, b, c]", None),
    ("names: {0: a, 0: b, 1: c}", None), ("names: [a, '', c]", None), ("names: " + "[" * 5000, None),
    ('names: ["a\\x1b", b, c]', None), ("- a", None), ("", None),
])  # fmt: skip
def test_yaml_names_are_as_written(tmp_path, text, names):
    root = yolo(tmp_path)
    (root / "classes.txt").unlink()
    (root / "data.yaml").write_text(text)
    if names is None:
        refused(read_boxes, root, message="data.yaml")
    else:
        assert list(read_boxes(root)[0]["train"].categories) == names


def test_lists_of_classes_have_no_byte_order_mark(tmp_path):
    root = yolo(tmp_path)
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfCar\nPeople\nBus\n")
    assert list(read_boxes(root)[0]["train"].categories) == ["Car", "People", "Bus"]
    (root / "classes.txt").write_text("Car\nBus\n", encoding="utf-16")
    refused(read_boxes, root, message="no text in UTF-8")


@pytest.mark.parametrize("images, category", [
    (["a\0b"], "a"), (["\ud800"], "a"), (["a.png", "./a.png"], "a"), (["a.png"], "a\nb"), (["a.png"], "\ud800"),
])  # fmt: skip
def test_names_in_coco_files(tmp_path, images, category):
    entries = [{"id": n, "file_name": name} for n, name in enumerate(images)]
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": category}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    refused(read_coco, tmp_path / "a.json", tmp_path, message="a.json")


@pytest.mark.parametrize("value", ["1e999", "NaN", "9" * 5000, '"x"'])
def test_values_of_classes(tmp_path, value):
    (tmp_path / "classes.json").write_text(f'{{"classes": [{{"value": {value}, "name": "a"}}]}}')
    refused(read_classes, tmp_path / "classes.json", message="classes.json")


@pytest.mark.parametrize("text", [
    '{"size": [100000, 20000], "counts": [2000000000]}', '{"size": [-5, -5], "counts": [25]}',
    '{"size": [0, 5], "counts": [0]}', '{"size": [Infinity, 1], "counts": [2]}', '{"size": [1, 2], "counts": [[1]]}',
    '{"size": [1, 2], "counts": 5}', '{"size": [null, 1], "counts": [2]}', "[" * 100_000, "[[1e999, 0, 1, 2, 3, 4]]",
    '{"size": [30, 40], "counts": "' + "o" * 1_000_000 + '"}', json.dumps([[1, 2, 3, 4, 5, 6]] * 50_000),
    json.dumps([[1, 2] * 500_000]),
], ids=range(12))  # fmt: skip
def test_outlines_without_end_are_damage(text):
    start = time.monotonic()
    with pytest.raises(CorruptExample):
        outline(text, np.array([0, 0, 20, 20]))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("found", [{"size": [30, 40], "counts": [10**18]}, [[1, 2, 3, 4, 5, 6]] * 10_000])
def test_outlines_that_training_would_skip_are_not_built(tmp_path, found):
    annotation = Annotation("annotation 7", (1, 2, 8, 6), "a", 48, False, found)
    grid = Grid(CocoImage("a.png", (40, 30), [annotation]), Example("a.png", b"", "png", 30, 40, 8), tmp_path)
    refused(grid.place_segmentation, annotation, message="annotation 7")
