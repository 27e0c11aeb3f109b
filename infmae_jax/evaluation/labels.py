"""Image classification labels: a CSV with one row an image (file, split, label columns)."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.errors import InputError

FILE_COLUMN = "file"
SPLIT_COLUMN = "split"


@dataclasses.dataclass(frozen=True)
class LabelColumn:
    """classes: names in order, numbers in numerical order; train (n,), test (m,) int32: class of each image."""

    classes: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Labelled images: paths of the train and test images, and each label column by name."""

    csv: Path
    train_files: tuple[Path, ...]
    test_files: tuple[Path, ...]
    columns: dict[str, LabelColumn]


def read_labels(
    path: str | Path, columns: Sequence[str], train_split: str = "train", test_split: str = "val"
) -> LabelTable:
    """Reads and checks a label CSV.

    Args:
      path: CSV (UTF-8) with a header. `file` is a path relative to the CSV's folder, `split` the name of a split.
      columns: the label columns; their values are class names, also where they look like numbers.
      train_split, test_split: the two splits to use; rows of other splits are left out.

    Raises:
      InputError: the CSV is missing or empty, a column is unknown, a row has no label or names a missing file or one
        of the other split, a split has no images, or a column does not have at least two classes in training, with
        every class of the test split among them.
    """
    path = Path(path)
    rows = _read_rows(path, columns)
    splits = {line: row[SPLIT_COLUMN].strip() for line, row in rows}
    for split in (train_split, test_split):
        if split not in splits.values():
            found = ", ".join(sorted(set(splits.values())))
            raise InputError(f"{path}: no row has split {split!r} (they are {found}); set train_split, test_split")
    rows = [(line, row) for line, row in rows if splits[line] in (train_split, test_split)]
    files = _existing_files(path, rows, splits)
    is_train = np.array([splits[line] == train_split for line, _ in rows])
    return LabelTable(
        csv=path,
        train_files=tuple(file for file, train in zip(files, is_train) if train),
        test_files=tuple(file for file, train in zip(files, is_train) if not train),
        columns={name: _label_column(path, name, rows, is_train) for name in columns},
    )


def _read_rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of each data row, with `file`, `split` and every label column present."""
    if not path.is_file():
        raise InputError(f"{path}: no such label CSV; give a file with the columns file, split and the labels")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = [name for name in reader.fieldnames or [] if name]
            for name in (FILE_COLUMN, SPLIT_COLUMN, *columns):
                if name not in header:
                    raise InputError(f"{path}: no column {name!r}; its columns are {', '.join(header) or '(none)'}")
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV in UTF-8 ({error})") from error
    for line, row in rows:
        for name in (FILE_COLUMN, SPLIT_COLUMN, *columns):
            if not (row[name] or "").strip():
                raise InputError(f"{path}, line {line}: column {name!r} is empty; fill it or remove the row")
    if not rows:
        raise InputError(f"{path}: has a header but no rows")
    return rows


def _existing_files(path: Path, rows: list[tuple[int, dict[str, str]]], splits: dict[int, str]) -> list[Path]:
    """Path of each row's image; the same image in both splits would make the result meaningless."""
    files, split_of = [], {}
    for line, row in rows:
        file = path.parent / row[FILE_COLUMN].strip()
        if not file.is_file():
            raise InputError(f"{path}, line {line}: image {file} does not exist; give paths from the CSV's folder")
        if split_of.setdefault(file, splits[line]) != splits[line]:
            raise InputError(f"{path}, line {line}: image {file} is in more than one split; keep one of its rows")
        files.append(file)
    return files


def _label_column(path: Path, name: str, rows: list[tuple[int, dict[str, str]]], is_train: np.ndarray) -> LabelColumn:
    values = np.array([row[name].strip() for _, row in rows])
    classes = _sorted_classes(set(values[is_train].tolist()))
    unseen = sorted(set(values.tolist()) - set(classes))
    if unseen:
        raise InputError(f"{path}: {name} {unseen[0]!r} has no training image; add one or remove its rows")
    if len(classes) < 2:
        raise InputError(f"{path}: all training images have {name} {classes[0]!r}; a probe needs two classes or more")
    ids = np.array([classes.index(value) for value in values], np.int32)
    return LabelColumn(classes, train=ids[is_train], test=ids[~is_train])


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))
