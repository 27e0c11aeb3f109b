"""COCO files as they come: a mistake is one line that names the entry, a certain difference of grids is applied."""

import copy
import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines.builders.build import build
from data_pipelines.builders.coco_file import read_coco
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example
from data_pipelines.shards import ShardReader, read_manifest
from tests.data_pipelines.shard_sets import counts, notes

GOOD = {
    "info": {"year": 2024},
    "images": [
        {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 7, "file_name": "b.png", "width": 40, "height": 30, "license": 1},
    ],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 9, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [4.5, 2, 10, 8], "area": 80.0, "segmentation": []},
        {"id": 3, "image_id": 7, "category_id": 9, "bbox": [0, 0, 5, 5], "iscrowd": 1,
         "segmentation": {"size": [30, 40], "counts": "`U1"}},
    ],
    "categories": [{"id": 9, "name": "car"}, {"id": 2, "name": "person", "supercategory": "x"}],
}  # fmt: skip


def write(tmp_path, coco, size=(30, 40), exif=None, image_format="PNG"):
    """The folder of a data set: noise images of `size` with an orientation tag, and the annotations."""
    root = tmp_path / "set"
    (root / "images/train").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number, entry in enumerate(coco["images"]):
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        tags = Image.Exif()
        if exif:
            tags[0x0112] = exif
        Image.fromarray(pixels).save(root / "images/train" / entry["file_name"], image_format, exif=tags)
    (root / "annotations/train.json").write_text(json.dumps(coco))
    return root


def boxes(folder):
    return {e.key.split("/")[-1]: e.objects for e in map(decode_example, ShardReader(folder))}


def places(value, at=()):
    """Paths of all entries of nested JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*at, key)
        yield from places(item, (*at, key))


def spoiled(place, what):
    coco = copy.deepcopy(GOOD)
    parent = coco
    for key in place[:-1]:
        parent = parent[key]
    if what == "delete":
        del parent[place[-1]]
    elif what == "null":
        parent[place[-1]] = None
    elif isinstance(parent, list):
        parent.insert(place[-1], copy.deepcopy(parent[place[-1]]))
    return coco


@pytest.mark.parametrize("what", ["delete", "null", "double"])
def test_any_entry_deleted_nulled_or_doubled_is_one_line_or_the_same_set(tmp_path, what):
    path = tmp_path / "train.json"

    def read(coco):
        path.write_text(json.dumps(coco))
        return read_coco(path, tmp_path)

    good, errors = read(GOOD), 0
    # A whole annotation, and the box and area of one, are the two things that can be left out without a trace.
    optional = {("annotations", number) for number in range(3)}
    for place in places(GOOD):
        if what == "delete" and place in optional:
            continue
        try:
            found = read(spoiled(place, what))
        except InputError as error:
            errors += 1
            assert "\n" not in str(error) and str(path) in str(error), place
            continue
        for image, wanted in zip(found.images, good.images, strict=True):
            assert image.file_name == wanted.file_name
            assert [(a.bbox, a.category, a.area) for a in image.annotations] == [
                (a.bbox, a.category, a.area) for a in wanted.annotations
            ], place
        assert found.categories == good.categories
    assert errors > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coco: coco["annotations"][0].update(image_id=77), "annotation 1 has image_id 77, .* like 5, 7"),
        (lambda coco: coco["annotations"][0].update(image_id="5"), 'annotation 1 has image_id "5"'),
        (lambda coco: coco["annotations"][1].update(category_id="9"), 'annotation 2 has category_id "9", .* like 9, 2'),
        (lambda coco: coco["annotations"][1].update(bbox=[1, float("nan"), 2, 3]), "annotation 2 has bbox .*NaN"),
        (lambda coco: coco["annotations"][1].update(bbox=[1, 2, 3]), "annotation 2 has bbox"),
        (lambda coco: coco["annotations"][1].update(segmentation=[[1, 2]]), "annotation 2 has segmentation"),
        (lambda coco: coco["categories"][1].update(name="car"), 'category name "car" is used twice'),
        (lambda coco: coco["images"][1].update(file_name="a.png"), 'file_name "a.png" is used twice'),
        (lambda coco: coco["images"][1].update(id=5), "image 5: another image has the same id"),
        (lambda coco: coco["images"].append(3), "entry 2 of images is 3, not an object"),
    ],
)
def test_mistakes_name_the_entry(tmp_path, change, message):
    coco = copy.deepcopy(GOOD)
    change(coco)
    (tmp_path / "train.json").write_text(json.dumps(coco))
    with pytest.raises(InputError, match=message) as caught:
        read_coco(tmp_path / "train.json", tmp_path)
    assert "\n" not in str(caught.value)


def test_brackets_without_end_are_one_line(tmp_path):
    (tmp_path / "train.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not a COCO file"):
        read_coco(tmp_path / "train.json", tmp_path)


def test_labels_arrive_and_categories_are_matched_by_name(tmp_path):
    root = write(tmp_path, GOOD)
    (root / "images/val").mkdir()
    other = copy.deepcopy(GOOD)
    other["categories"] = [{"id": 1, "name": "person"}, {"id": 3, "name": "bus"}]
    other["annotations"] = [{"id": 1, "image_id": 5, "category_id": 1, "bbox": [0, 0, 4, 4]}]
    (root / "annotations/val.json").write_text(json.dumps(other))
    for name in ("a.png", "b.png"):
        (root / "images/val" / name).write_bytes((root / "images/train" / name).read_bytes())
    folder = build("coco_boxes", tmp_path / "data", root)
    assert read_manifest(folder).classes == {"objects": ("person", "car", "bus")}
    found = boxes(folder)["b.png"]
    np.testing.assert_allclose(found.boxes, [[4.5, 2, 14.5, 10], [0, 0, 5, 5]], atol=1e-5)
    assert found.classes.tolist() == [0, 1] and found.crowd.tolist() == [False, True]
    assert found.area.tolist() == [80, 25]
    assert [json.loads(text) for text in found.segmentations] == [[], {"size": [30, 40], "counts": "`U1"}]
    (val,) = [e.objects for e in map(decode_example, ShardReader(folder, "val")) if e.key == "val/a.png"]
    assert val.classes.tolist() == [0]


def upright(box, size, orientation):
    """Where a painted box lies after Pillow has turned the picture upright."""
    pixels = np.zeros(size, np.uint8)
    x, y, width, height = box
    pixels[y : y + height, x : x + width] = 1
    image = Image.fromarray(pixels)
    tags = image.getexif()
    tags[0x0112] = orientation
    from PIL import ImageOps

    rows, columns = np.nonzero(np.asarray(ImageOps.exif_transpose(image)))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_and_polygons_turn_with_their_image(tmp_path, orientation):
    coco = copy.deepcopy(GOOD)
    coco["annotations"] = [
        {"id": 1, "image_id": 5, "category_id": 9, "bbox": [25, 3, 10, 8], "segmentation": [[25, 3, 35, 3, 35, 11]]}
    ]
    root = write(tmp_path, coco, exif=orientation)
    built = build("coco_boxes", tmp_path / "data", root)
    objects = boxes(built)["a.png"]
    wanted = upright((25, 3, 10, 8), (30, 40), orientation)
    np.testing.assert_allclose(objects.boxes, [wanted], atol=1e-4)
    points = np.array(json.loads(objects.segmentations[0])).reshape(-1, 2)
    assert [*points.min(0), *points.max(0)] == wanted
    turned = {} if orientation == 1 else {"boxes rotated with their image (EXIF)": 1}
    assert notes(built) == {**turned, "images without boxes": 1}


def test_boxes_of_a_resized_copy_are_rescaled_and_counted(tmp_path):
    coco = copy.deepcopy(GOOD)
    del coco["annotations"][2]["segmentation"]
    for image in coco["images"]:
        image.update(width=80, height=60)
    built = build("coco_boxes", tmp_path / "data", write(tmp_path, coco))
    found = boxes(built)
    np.testing.assert_allclose(found["a.png"].boxes, [[0.5, 1, 5.5, 5]], atol=1e-5)
    assert found["a.png"].area.tolist() == [20]
    assert notes(built) == {"boxes rescaled to their image": 3}


@pytest.mark.parametrize(
    ("size", "exif"), [((40, 40), None), ((200, 40), None), ((None, None), 6), ((30, 40), 3), ((29, 40), None)]
)
def test_uncertain_grids_are_refused_by_name(tmp_path, size, exif):
    coco = copy.deepcopy(GOOD)
    for image in coco["images"]:
        image.update(height=size[0], width=size[1])
    with pytest.raises(InputError, match="a.png decodes to .* not certain"):
        build("coco_boxes", tmp_path / "data", write(tmp_path, coco, exif=exif))


def test_rle_of_another_grid_is_refused(tmp_path):
    coco = copy.deepcopy(GOOD)
    coco["annotations"][2]["segmentation"]["size"] = [60, 80]
    with pytest.raises(InputError, match="annotation 3 has RLE"):
        build("coco_boxes", tmp_path / "data", write(tmp_path, coco))


def test_copies_of_entries_count_once(tmp_path, caplog):
    coco = copy.deepcopy(GOOD)
    for kind in ("images", "annotations", "categories"):
        coco[kind] += copy.deepcopy(coco[kind])
    random.Random(1).shuffle(coco["annotations"])
    (tmp_path / "train.json").write_text(json.dumps(coco))
    found = read_coco(tmp_path / "train.json", tmp_path)
    assert [len(image.annotations) for image in found.images] == [1, 2] and found.categories == {"person": 2, "car": 9}


def test_what_no_annotations_list_is_counted(tmp_path, caplog):
    root = write(tmp_path, GOOD)
    (root / "images/train/more").mkdir()
    for name in ("c.png", "more/a.png", "more/._a.png"):
        shutil.copy(root / "images/train/a.png", root / "images/train" / name)
    shutil.copy(root / "annotations/train.json", root / "annotations/val.json")
    for number, name in enumerate(("coco_boxes", "weak_small_targets")):
        built = build(name, tmp_path / f"data{number}", root)
        assert notes(built)["images of train left out, as the annotations do not list them"] == 2
        assert sum(counts(built).values()) == 2
    assert "images/SPLIT for them: val.json" in caplog.text
    assert "val.json" in read_manifest(tmp_path / "data0/coco_boxes/gray8/1.0.0").settings["split"]


def test_images_in_two_splits_are_counted(tmp_path):
    root = write(tmp_path, GOOD)
    shutil.copytree(root / "images/train", root / "images/val")
    Image.new("L", (40, 30)).save(root / "images/val/b.png")
    shutil.copy(root / "annotations/train.json", root / "annotations/val.json")
    built = build("coco_boxes", tmp_path / "data", root)
    assert notes(built)["images of val whose pixels are in train too"] == 1
