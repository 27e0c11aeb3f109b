"""Preparing whole collections: duplicates, the report and its pictures, archives, the real unusual files."""

import csv
import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_pipelines.examples import decode_example, decode_pixels
from data_pipelines.prepare import PrepareConfig, prepare
from data_pipelines.prepare.duplicates import DuplicateRule
from data_pipelines.shards import ShardReader
from tests.data_pipelines.planted import synthetic_scenes
from tests.data_pipelines.test_prepare import read_rejected, shard_bytes

EVERYTHING = PrepareConfig(duplicates=DuplicateRule(exact=False, near=False), pictures=False)


def save(pixels: np.ndarray, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def kept_keys(output) -> list[str]:
    return [decode_example(stored).key for stored in ShardReader(output)]


@pytest.fixture
def scenes_with_copies(tmp_path):
    """Three scenes; of the first an exact copy, a small copy that comes before it, and a copy of that one."""
    first, second, third = synthetic_scenes(3, 9)
    small = np.asarray(Image.fromarray(first).resize((160, 128), Image.Resampling.BOX))
    save(small, tmp_path / "in" / "a_small.png")
    save(first, tmp_path / "in" / "b_first.png")
    save(first, tmp_path / "in" / "c_first_again.bmp")
    save(small, tmp_path / "in" / "d_small_again.tif")
    save(second, tmp_path / "in" / "e_second.png")
    save(third, tmp_path / "in" / "f_third.png")
    return tmp_path / "in"


def test_the_largest_image_of_a_scene_is_kept_and_named_as_anchor(scenes_with_copies, tmp_path):
    prepare([scenes_with_copies], tmp_path / "out", workers=0)
    assert kept_keys(tmp_path / "out") == ["in/b_first.png", "in/e_second.png", "in/f_third.png"]
    rows = {row["path"]: (row["reason"], row["anchor"]) for row in read_rejected(tmp_path / "out")}
    assert rows == {
        "in/a_small.png": ("near_duplicate", "in/b_first.png"),
        "in/c_first_again.bmp": ("exact_duplicate", "in/b_first.png"),
        "in/d_small_again.tif": ("exact_duplicate", "in/b_first.png"),
    }


def test_duplicate_filters_can_be_switched_off(scenes_with_copies, tmp_path):
    for name, rule, kept in (
        ("neither", DuplicateRule(exact=False, near=False), 6),
        ("exact", DuplicateRule(near=False), 4),
        ("near", DuplicateRule(exact=False), 3),
        ("strict", DuplicateRule(threshold=1.0), 4),
    ):
        config = PrepareConfig(duplicates=rule, pictures=False)
        assert prepare([scenes_with_copies], tmp_path / name, config, workers=0).count == kept


def test_report_and_pictures(scenes_with_copies, tmp_path):
    (scenes_with_copies / "notes.txt").write_text("text")
    save(np.full((64, 64), 3, np.uint8), scenes_with_copies / "flat.png")
    prepare([scenes_with_copies], tmp_path / "out", workers=0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["found"], report["kept"]) == (8, 3)
    assert report["rejected"] == {"exact_duplicate": 2, "near_duplicate": 1, "not_an_image": 1, "constant": 1}
    assert report["duplicates"] == {"removed": 3, "scenes": 1, "largest_scene": 3}
    assert report["kinds_before_duplicates"] == {"BMP L": 1, "PNG L": 4, "TIFF L": 1}
    pictures = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "out" / "pictures").iterdir()}
    reasons = {f"rejected_{reason}.png" for reason in report["rejected"]}
    assert pictures.keys() == {"kept.png", "histograms.png"} | reasons
    assert all(picture.std() > 5 for picture in pictures.values())


def test_archives_give_the_same_images_as_the_folder(scenes_with_copies, tmp_path):
    prepare([scenes_with_copies], tmp_path / "folder", EVERYTHING, workers=0)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted(scenes_with_copies.iterdir()):
            archive.write(path, path.name)
    prepare([tmp_path / "in.zip"], tmp_path / "zip", EVERYTHING, workers=0)
    in_folder, in_zip = (
        [dataclasses.replace(decode_example(stored), key="") for stored in ShardReader(tmp_path / name)]
        for name in ("folder", "zip")
    )
    assert in_folder == in_zip and len(in_zip) == 6
    assert shard_bytes(tmp_path / "folder") != shard_bytes(tmp_path / "zip")  # the keys differ


def test_unusual_real_files_are_all_accounted_for(shared_folder, tmp_path):
    data = shared_folder / "data"
    manifest = prepare([data / "corrupt", data / "flir"], tmp_path / "out", EVERYTHING, workers=0)
    files = [path for folder in ("corrupt", "flir") for path in (data / folder).iterdir()]
    assert len(files) == manifest.count + sum(manifest.settings["rejected"].values())
    assert {row["path"]: row["reason"] for row in read_rejected(tmp_path / "out")} == {
        "corrupt/README.md": "not_an_image",
        "corrupt/bilevel.png": "too_few_levels",
        "corrupt/black.png": "constant",
        "corrupt/constant.png": "constant",
        "corrupt/one_pixel.png": "too_small",
        "corrupt/text_file.jpg": "not_an_image",
        "corrupt/truncated.jpg": "truncated",
        "corrupt/truncated_header.jpg": "truncated",
        "corrupt/zero_byte.jpg": "empty_file",
        "flir/ATTRIBUTION.md": "not_an_image",
    }
    records = {record.key: record for record in map(decode_example, ShardReader(tmp_path / "out"))}
    deep = [path for path in (data / "corrupt").iterdir() if path.name.endswith("16bit.png")]
    assert len(deep) == 3
    for path in deep:
        pixels = decode_pixels(records[f"corrupt/{path.name}"])
        assert pixels.dtype == np.uint16
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))
    celsius = records["corrupt/float32_celsius.tif"]
    values = decode_pixels(celsius) * celsius.attributes["scale"] + celsius.attributes["offset"]
    np.testing.assert_allclose(values, np.asarray(Image.open(data / "corrupt/float32_celsius.tif")), atol=5e-4)


def test_rejected_list_is_plain_csv(tmp_path):
    save(synthetic_scenes(1, 0)[0], tmp_path / "in" / "good.png")
    (tmp_path / "in" / 'odd, "name"\n.txt').write_text("x")
    prepare([tmp_path / "in"], tmp_path / "out", EVERYTHING, workers=0)
    text = (tmp_path / "out" / "rejected.csv").read_text()
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["path", "reason", "detail", "anchor"]
    assert rows[1][:2] == ['in/odd, "name"\\x0a.txt', "not_an_image"] and len(rows) == 2 == len(text.splitlines())
