"""Where images come from: folders, globs, zip and tar files; every file listed once, in an order that never varies.

Members of archives are read in place, nothing is unpacked to disk. A compressed tar file can only be read from its
start, so it is listed in one pass and read in another, as one piece of work; zip and plain tar files are split like
folders. Archives inside archives are not opened. Folders that this package made (shard sets and their pictures, the
work of an unfinished run) are not taken for images.
"""

import dataclasses
import functools
import glob
import itertools
import os
import stat
from collections.abc import Iterator, Sequence

from data_pipelines.commands import printable
from data_pipelines.errors import InputError
from data_pipelines.files import is_made, local_path
from data_pipelines.prepare.archives import Rejection, Source, is_archive, list_archive

PART_SIZE = 256  # files


@dataclasses.dataclass(frozen=True)
class Listing:
    """What was found below `inputs`: readable files in reading order, and what could not even be opened."""

    inputs: tuple[str, ...]
    sources: tuple[Source, ...]
    rejections: tuple[Rejection, ...]


def list_sources(inputs: Sequence[str | os.PathLike], without: Sequence[str] = ()) -> Listing:
    """Lists every file below the inputs, sorted by path within an input.

    Args:
      inputs: folders, image files, zip or tar files, or glob patterns (`**` for any depth); `~` is a home folder. The
        key of a file starts with the name of its input; of a glob pattern, with the name of the folder before its
        first wildcard.
      without: folders to pass over without a word, the output for example.

    Symbolic links are followed; one that leads to a folder which was listed already (a loop among others) is not.

    Raises:
      InputError: an input does not exist, or a pattern matches nothing.
    """
    found: list[Source | Rejection] = []
    roots_seen: dict[str, int] = {}
    folders_seen: set[tuple[int, int]] = set()
    hidden = tuple(map(os.path.realpath, without))

    @functools.cache
    def lies_in_made(folder: str, root: str) -> bool:
        """Whether a folder below `root` lies in one that this package made: what a pattern finds there is no input."""
        above = os.path.dirname(folder)
        return len(folder) > len(root) and (is_made(os.listdir(folder)) or lies_in_made(above, root))

    for given in map(os.fspath, inputs):
        root, paths = _expand(given)
        name = printable(os.path.basename(root)) or "root"
        roots_seen[name] = roots_seen.get(name, 0) + 1
        root_key = name if roots_seen[name] == 1 else f"{name}~{roots_seen[name]}"
        # Inputs inside the output are a mistake that `prepare` names, once it finds the output in its way.
        passed_over = [folder for folder in hidden if not _is_inside(root, [folder])]
        for path in paths:
            key = root_key if path == root else f"{root_key}/{printable(os.path.relpath(path, root))}"
            if not lies_in_made(os.path.dirname(path), root):
                found.extend(_walk(path, key, folders_seen, passed_over))
    return Listing(
        inputs=tuple(map(os.fspath, inputs)),
        sources=tuple(_with_unique_keys(item for item in found if isinstance(item, Source))),
        rejections=tuple(item for item in found if isinstance(item, Rejection)),
    )


def _expand(given: str) -> tuple[str, list[str]]:
    """Returns the root of an input, and the paths to list: the root itself, or what a pattern matches."""
    path = local_path(given, "input")
    if os.path.exists(path):
        return path, [path]
    if not glob.has_magic(given):
        remedy = "repeat --input for each of several" if "," in given else "check the path"
        raise InputError(f"input {given} does not exist: {remedy}")
    # The folders that exist are meant literally, whatever brackets their names hold.
    root = path
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    matches = sorted(glob.glob(glob.escape(root) + path[len(root) :], recursive=True))
    if not matches:
        raise InputError(f"no file matches the pattern {given}: check it (quote it, so that the shell leaves it alone)")
    return root, matches


def _is_inside(path: str, folders: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return any(f"{real}/".startswith(f"{folder}/") for folder in folders)


def _walk(
    path: str, key: str, folders_seen: set[tuple[int, int]], passed_over: Sequence[str]
) -> Iterator[Source | Rejection]:
    """Yields what is at `path` and below, depth first, by sorted names."""
    waiting = [(path, key)]
    start = path
    while waiting:
        path, key = waiting.pop()
        try:
            status = os.stat(path)
            is_folder = stat.S_ISDIR(status.st_mode)
            if (is_folder or path == start) and _is_inside(path, passed_over):
                continue
            if is_folder:
                identity = (status.st_dev, status.st_ino)
                names = sorted(os.listdir(path), reverse=True)
                if identity in folders_seen:
                    reason = "symlink_loop" if os.path.islink(path) else "listed_twice"
                    yield Rejection(key, reason, f"leads to {printable(os.path.realpath(path))}, listed already")
                elif is_made(names):
                    yield Rejection(key, "shard_set", "made by this package: shards, a run, predictions or scores")
                else:
                    waiting.extend((os.path.join(path, name), f"{key}/{printable(name)}") for name in names)
                folders_seen.add(identity)
            elif stat.S_ISREG(status.st_mode):
                source = Source(key, path, status.st_size, status.st_mtime_ns)
                yield from list_archive(source) if is_archive(path) else [source]
            else:
                yield Rejection(key, "not_a_file", "a device, pipe or socket")
        except OSError as error:
            loop = os.path.islink(path) and "symbolic links" in str(error)
            yield Rejection(key, "symlink_loop" if loop else "unreadable", error.strerror or str(error))


def _with_unique_keys(sources: Iterator[Source]) -> Iterator[Source]:
    """Numbers the later ones of equal keys: an archive may hold one name twice, a pattern match a file twice."""
    seen: dict[str, int] = {}
    for source in sources:
        seen[source.key] = count = seen.get(source.key, 0) + 1
        yield source if count == 1 else dataclasses.replace(source, key=f"{source.key}~{count}")


def split_into_parts(sources: Sequence[Source], size: int = PART_SIZE) -> list[list[Source]]:
    """Splits a listing into runs of at most `size` files; the members of a compressed tar file stay together."""
    parts: list[list[Source]] = []
    for compressed_tar, group in itertools.groupby(sources, lambda source: source.sequential and source.path):
        together = list(group)
        step = len(together) if compressed_tar else size
        parts += [together[start : start + step] for start in range(0, len(together), step)]
    return parts
