"""Examples with labels, from any source, as a shard set; and labels of whole images from a CSV table."""

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.commands import printable, progress_bar
from data_pipelines.errors import InputError, refusing
from data_pipelines.examples import LABEL, Example, decode_pixels, encode_example
from data_pipelines.files import local_path, new_folder, read_text
from data_pipelines.prepare.archives import Rejection, Source
from data_pipelines.prepare.collect import Candidate, describe_image, read_images
from data_pipelines.prepare.curate import Filters
from data_pipelines.prepare.results import write_set_manifest
from data_pipelines.shards import SPLIT_NAME, Manifest, write_split

FILE_COLUMN, SPLIT_COLUMN = "file", "split"
_LARGEST_TABLE = 1 << 30  # bytes


def write_examples(
    output: str | os.PathLike,
    splits: Mapping[str, Iterable[Example]],
    classes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
) -> Manifest:
    """Writes examples into a new shard set, whole or not at all.

    Args:
      output: must not exist, or be an empty folder.
      splits: the examples of each split, in order.
      classes: names in the order of their numbers, of "mask", "objects" and each label.
      settings: what they were made from; stored in the manifest.

    Raises:
      InputError: the output is in the way or cannot be written.
    """
    rows: list[Candidate] = []

    def encoded(examples: Iterable[Example]) -> Iterator[bytes]:
        for example in examples:
            rows.append(describe_image(example, decode_pixels(example)))
            yield encode_example(example)

    with new_folder(output) as folder:
        made = {name: write_split(folder, name, encoded(examples)) for name, examples in splits.items()}
        return write_set_manifest(folder, rows, made, classes, settings)


def labelled_image(path: str | os.PathLike, key: str, encoding: str = "source", bit_depth: int = 0) -> Example:
    """Returns the example of an image that has labels, uncropped; `bit_depth` as in `Filters`.

    Raises:
      InputError: it cannot be used; leaving it out would silently drop its labels.
    """
    refused: list[Rejection] = []
    source = Source(printable(key), str(path), size=0, modified=0)
    # Labels belong to the pixels of the source: nothing may be cropped, and a small or flat image keeps its labels.
    filters = Filters(min_side=0, min_levels=0, crop_borders=False, bit_depth=bit_depth)
    for example, _ in read_images([source], filters, refused, encoding):
        return example
    reason = f"{refused[0].reason}: {refused[0].detail}"
    raise InputError(f"labelled image {path} is not usable ({reason}); fix it or remove its entry")


@dataclasses.dataclass(frozen=True)
class _Row:
    line: int
    file: str
    split: str
    labels: tuple[str, ...]


def prepare_table(
    table: str | os.PathLike, columns: Sequence[str], output: str | os.PathLike, encoding: str = "source"
) -> Manifest:
    """Writes the images that a CSV table lists, with their class labels, into the new shard set `output`.

    Args:
      table: CSV (UTF-8, comma) with a header. Column `file` is a path relative to the table's folder, `split` a name.
      columns: the label columns; their values are class names, numbered in order (in numerical order where all are
        numbers). A single column is stored as the label "label", several under their own names.
      output: new folder.
      encoding: see `prepare.PrepareConfig`.

    Raises:
      InputError: the table or an image is unusable, or one image is in two splits: the same file, or the same pixels.
    """
    table, rows = _read_table(table, columns)
    names = [LABEL] if len(columns) == 1 else list(columns)
    classes = {name: sorted_classes(row.labels[place] for row in rows) for place, name in enumerate(names)}
    numbers = {name: {text: number for number, text in enumerate(classes[name])} for name in names}
    seen: dict[str, _Row] = {}

    def examples(split: str) -> Iterator[Example]:
        for row in rows:
            if row.split != split:
                continue
            example = labelled_image(table.parent / row.file, row.file, encoding)
            content = describe_image(example, decode_pixels(example)).content
            other = seen.setdefault(content, row)
            if other.split != row.split:
                raise InputError(
                    f"{table}, line {row.line}: image {row.file} of split {row.split} has the pixels of {other.file} "
                    f"(line {other.line}) of split {other.split}: keep one of them"
                )
            labels = {name: numbers[name][text] for name, text in zip(names, row.labels, strict=True)}
            bar.update(1)
            yield dataclasses.replace(example, labels=labels)

    splits = {split: examples(split) for split in dict.fromkeys(row.split for row in rows)}
    settings = {"table": table.name, "columns": list(columns), "encoding": encoding}
    with progress_bar("labelling", len(rows), "image") as bar:
        return write_examples(output, splits, classes, settings)


def table_digest(table: str | os.PathLike, columns: Sequence[str]) -> str:
    """Tells tables apart: 16 hexadecimal digits of their rows and of the sizes and times of the files that they name.

    Raises:
      InputError: as `prepare_table`, of the table and of missing files.
    """
    table, rows = _read_table(table, columns)
    stats = [(table.parent / row.file).stat() for row in rows]
    known = [(row.file, row.split, row.labels, s.st_size, s.st_mtime_ns) for row, s in zip(rows, stats, strict=True)]
    return hashlib.sha256(json.dumps([list(columns), known]).encode()).hexdigest()[:16]


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct class names in order; in numerical order where all are numbers."""
    distinct = set(names)
    try:
        return tuple(sorted(distinct, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(distinct))


def _read_table(given: str | os.PathLike, columns: Sequence[str]) -> tuple[Path, list[_Row]]:
    """The path and rows of a table, each of which names a file of its own."""
    table = Path(local_path(given, "table"))
    if not columns:
        raise InputError(f"{table}: name at least one label column")
    remedy = "give a table of files and labels"
    with refusing(f"{table} is not a readable CSV in UTF-8", remedy, OSError, csv.Error):
        reader = csv.reader(io.StringIO(read_text(table, _LARGEST_TABLE), newline=""))
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    header, needed = lines[0][1] if lines else [], (FILE_COLUMN, SPLIT_COLUMN, *columns)
    for name in needed:
        if header.count(name) != 1:
            raise InputError(
                f"{table}: {header.count(name)} columns {name!r}; they are {', '.join(header) or '(none)'}"
            )
    if not lines[1:]:
        raise InputError(f"{table} has a header but no rows")
    rows, seen = [], {}
    for line, cells in lines[1:]:
        where = f"{table}, line {line}"
        if len(cells) != len(header):
            raise InputError(f"{where} has {len(cells)} fields, the header {len(header)}: quote fields with commas")
        file, split, *labels = (cells[header.index(name)] for name in needed)
        for name, cell in zip(needed, (file, split, *labels), strict=True):
            if not cell:
                raise InputError(f"{where}: column {name!r} is empty; fill it or remove the row")
            if name != FILE_COLUMN and printable(cell) != cell:
                raise InputError(f"{where}: {printable(cell)} in column {name!r} has control characters; remove them")
        if not SPLIT_NAME.fullmatch(split):
            raise InputError(f"{where}: the split {split!r} cannot be a file name; use letters, digits, dots, dashes")
        path = table.parent / file
        if PurePosixPath(file).is_absolute():
            raise InputError(f"{where}: {file} is absolute: give paths from the table's folder, {table.parent}")
        if not path.is_file():
            raise InputError(f"{where}: no image {path}; give paths from the table's folder")
        rows.append(_Row(line, file, split, tuple(labels)))
        # By its real path: links and `..` lead to the same file.
        other = seen.setdefault(os.path.realpath(path), rows[-1])
        if other is not rows[-1]:
            there = "the same split" if other.split == split else f"split {other.split}"
            raise InputError(f"{where}: {file} is in line {other.line} ({there}) too; keep one row")
    return table, rows
