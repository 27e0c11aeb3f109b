import csv

import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.evaluation.labels import read_labels
from tests.evaluation.conftest import write_csv


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.reader(stream))[1:]


def test_labels_equal_the_rows(labelled):
    table = read_labels(labelled, ["label", "angle"])
    rows = rows_of(labelled)
    for split, files, column in (("train", table.train_files, "train"), ("val", table.test_files, "test")):
        chosen = [row for row in rows if row[1] == split]
        assert [str(f.relative_to(labelled.parent)) for f in files] == [row[0] for row in chosen]
        for index, name in ((2, "label"), (3, "angle")):
            labels = table.columns[name]
            assert [labels.classes[i] for i in getattr(labels, column)] == [row[index] for row in chosen]


def test_numbers_are_classes_in_numerical_order(labelled):
    rows = [(*row[:3], ("100", "9", "30.5")[i % 3]) for i, row in enumerate(rows_of(labelled))]
    write_csv(labelled, rows)
    column = read_labels(labelled, ["angle"]).columns["angle"]
    assert column.classes == ("9", "30.5", "100")
    assert column.train.dtype == np.int32


def test_other_splits_are_left_out(labelled):
    rows = rows_of(labelled)
    write_csv(labelled, rows + [("no_such_file.png", "test", "cold", "0")])
    assert len(read_labels(labelled, ["label"]).train_files) == 20


def test_a_byte_order_mark_is_no_part_of_the_header(labelled):
    labelled.write_bytes(b"\xef\xbb\xbf" + labelled.read_bytes())
    assert len(read_labels(labelled, ["label"]).test_files) == 10


def break_row(index, column, value):
    def change(rows):
        rows[index] = [value if i == column else v for i, v in enumerate(rows[index])]
        return rows

    return change


@pytest.mark.parametrize(
    "change, column, words",
    [
        (break_row(3, 0, "images/none.png"), "label", ["line 5", "none.png", "does not exist"]),
        (break_row(29, 0, "images/00.png"), "label", ["line 31", "00.png", "more than one split"]),
        (break_row(7, 2, " "), "label", ["line 9", "'label'", "empty"]),
        (break_row(29, 2, "warm"), "label", ["'warm'", "no training image"]),
        (lambda rows: [r for r in rows if r[1] == "train"], "label", ["'val'", "train"]),
        (lambda rows: [r for r in rows if r[2] == "hot"], "label", ["'hot'", "two classes"]),
        (lambda rows: [], "label", ["no rows"]),
        (lambda rows: rows, "colour", ["'colour'", "file, split, label, angle"]),
        (lambda rows: [[*rows[0][:2]], *rows[1:]], "label", ["line 2", "empty"]),
    ],
)
def test_bad_csv_is_one_line_naming_the_place(labelled, change, column, words):
    write_csv(labelled, change(rows_of(labelled)))
    with pytest.raises(InputError) as error:
        read_labels(labelled, [column])
    assert "\n" not in str(error.value)
    for word in [*words, str(labelled)]:
        assert word in str(error.value)


def test_missing_csv_and_no_text(tmp_path):
    with pytest.raises(InputError, match="no such label CSV"):
        read_labels(tmp_path / "none.csv", ["label"])
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="binary.csv"):
        read_labels(tmp_path / "binary.csv", ["label"])


def test_real_label_files(shared_folder):
    table = read_labels(shared_folder / "data/hit_uav/probe_labels.csv", ["camera_angle_deg", "day_night_flag"])
    assert (len(table.train_files), len(table.test_files)) == (1928, 391)
    assert table.columns["camera_angle_deg"].classes == ("30", "40", "50", "60", "70", "80", "90")
    table = read_labels(shared_folder / "data/drone_ir/class_labels.csv", ["label"])
    assert table.columns["label"].classes == ("airplane", "bird", "drone", "helicopter")
