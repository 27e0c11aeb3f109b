"""Files: the one way in which this project writes them, whole or absent, and finds images in folders."""

import contextlib
import csv
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.commands import csv_cell
from data_pipelines.errors import InputError, refusing

PLAN_NAME = "prepare_plan"  # in the work folder of an unfinished shard set
# Beside shard sets: work on one, runs, predictions, scores.
_MADE = (
    {PLAN_NAME}, {"config.json", "events.jsonl"}, {"settings.json", "predictions.jsonl"}, {"scores.json", "scores.txt"}
)  # fmt: skip


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; it takes the place of `path` when the block ends well.

    A file is flushed to the disk before it is renamed, so that neither a kill nor a power cut leaves half of it. When
    the block fails, what was written is removed and `path` is as before.

    Raises:
      InputError: it is a URL.
      OSError: the folder cannot be made or written to.
    """
    path = Path(local_path(path, "output"))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table that no spreadsheet computes: cells that look like formulas begin with an apostrophe."""
    with atomic_write(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(map(csv_cell, row) for row in rows)


@contextlib.contextmanager
def new_folder(given: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill that appears at `given`, complete, when the block ends well, or not at all.

    Raises:
      InputError: `given` is a URL, something other than an empty folder is there, or it cannot be written.
    """
    output = local_path(given, "output")
    if not is_free(output):
        raise InputError(f"output {output} exists already and is not an empty folder: remove it or choose another")
    with writing(output), atomic_write(output) as partial:
        partial.mkdir()
        yield partial


def is_free(path: str) -> bool:
    """Whether nothing but an empty folder is there."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))


@contextlib.contextmanager
def writing(output: str | os.PathLike) -> Iterator[None]:
    """An InputError that names the output when the block meets a disk that is full, failing or not the user's."""
    try:
        yield
    except OSError as error:
        reason, file = error.strerror or error, error.filename
        if isinstance(file, str) and not os.path.abspath(output).startswith(os.path.dirname(os.path.abspath(file))):
            raise InputError(f"{file} cannot be used ({reason}): mend that and start again") from error
        blocked = isinstance(error, (NotADirectoryError, FileExistsError))
        remedy = "a file is in the way, choose another" if blocked else "make room or choose another"
        raise InputError(f"output {output} cannot be written ({reason}): {remedy}") from error


def local_path(given: str | os.PathLike, what: str) -> str:
    """The absolute path of a local file or folder, `~` expanded; `what` names it in the message.

    Raises:
      InputError: it is a URL, which would become a folder of that name.
    """
    given = os.fspath(given)
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:/)", given):
        raise InputError(
            f"{what} {given}: {scheme[0]}:// is not supported here, name a local path (copy files, or mount the bucket)"
        )
    return os.path.abspath(os.path.expanduser(given))


def read_text(path: str | os.PathLike, most: int) -> str:
    """The text of a file that may be a stranger's, without byte-order mark.

    Raises:
      InputError: it is no regular file (a pipe or a device may never end), has over `most` bytes, or is not UTF-8.
      OSError: it cannot be read.
    """
    with refusing(f"{path} is no text in UTF-8", "save it as UTF-8", UnicodeDecodeError):
        return read_regular(path, most).decode("utf-8-sig")


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The bytes of a file; raises as `read_text`."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file: put the file itself there")
    if status.st_size > most:
        raise InputError(f"{path} has {status.st_size} bytes, more than the {most} that such a file may have: split it")
    with open(path, "rb") as file:
        return file.read(status.st_size)  # not `most`, for which memory would be taken


def output_file(given: str | os.PathLike, what: str) -> Path:
    """The absolute path of a file that comes at the end of long work, refused before it where it could not be written.

    Raises:
      InputError: it is a URL or a folder, or its folder cannot be made or written to.
    """
    path = Path(local_path(given, what))
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder: name a file")
    require_writable(path.parent)
    return path


def require_writable(folder: Path) -> None:
    """InputError where files cannot be made in the folder, or in the nearest one above it that is there."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file: name a folder")
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass


def is_made(names: Iterable[str]) -> bool:
    """Whether a folder of these names was made by this project: the pictures in it are no images of anybody."""
    found = set(names)
    shards = "manifest.json" in found and any(".array_record" in name for name in found)
    return shards or any(made <= found for made in _MADE)


def images_in(sources: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """Image files as named; of folders all those with a suffix of an image, sorted by path. Left out are hidden files
    and folders, and what lies in a folder inside the named one that `is_made`."""
    suffixes = Image.registered_extensions()
    for source in map(Path, sources):
        source = source.expanduser()
        if not source.is_dir():
            yield source
            continue
        found: list[Path] = []
        for folder, inside, files in os.walk(source):
            if os.path.samefile(folder, source) or not is_made([*inside, *files]):
                inside[:] = [name for name in inside if not name.startswith(".")]
                found += [Path(folder, name) for name in files if not name.startswith(".")]
            else:
                inside.clear()
        yield from sorted(path for path in found if path.suffix.lower() in suffixes and path.is_file())
