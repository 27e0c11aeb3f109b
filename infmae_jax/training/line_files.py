"""Files of lines, as long runs make them: appended to whole or not at all, read from the end, in bounded memory."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_LINE = 1 << 20  # bytes; no line of ours comes near
_BLOCK = 1 << 16  # bytes read at a time from the end of a file


class AppendOnlyFile:
    """A file to which whole pieces are appended: after a failure (OSError) it is as long as before.

    Unbuffered, so that the process can be killed at any time, and opened when first used, so that opening can be tried
    anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: io.FileIO | None = None
        self._end = 0

    @property
    def size(self) -> int:
        """Bytes of what was appended whole."""
        self._opened()
        return self._end

    def append(self, data: bytes) -> None:
        file = self._opened()
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(f"{self.path}: {written} of {len(data)} bytes written, is the disk full?")
        except OSError:
            file.truncate(self._end)
            raise
        self._end += len(data)

    def truncate(self, end: int) -> None:
        """Cuts everything from byte `end` on."""
        self._opened().truncate(end)
        self._end = end

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "ab", buffering=0)
            # A process killed while it wrote leaves a piece of a line, which the next line must not continue.
            self._end = next((end for _, end in lines_from_the_end(self.path)), 0)
            file.truncate(self._end)
            self._file = file
        return self._file


def read_lines(path: Path, at_most: int | None = None) -> Iterator[bytes]:
    """Lines of a file from its beginning; of a long one about `at_most`, evenly spread in bytes, and the last."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if at_most is None or size <= at_most * len(file.readline(LONGEST_LINE)):
            file.seek(0)
            yield from iter(lambda: file.readline(LONGEST_LINE), b"")
            return
        for start in range(0, size, size // at_most + 1):
            file.seek(start)
            if start:
                file.readline(LONGEST_LINE)  # the end of a line
            yield file.readline(LONGEST_LINE)
        for line, end in lines_from_the_end(path):
            if end > file.tell():
                yield line
            return


def lines_from_the_end(path: Path) -> Iterator[tuple[bytes, int]]:
    """(line, offset of the byte after its line feed) of the whole lines of a file, the last one first."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = os.fstat(file.fileno()).st_size
        end, rest, skipped = start + 1, b"", 0  # as if a line feed came after what the file ends with
        whole = False
        while start > 0:
            size = min(_BLOCK, start)
            start -= size
            file.seek(start)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines):
                if whole:
                    yield line, end
                end -= len(line) + skipped + 1
                whole, skipped = True, 0
            if len(rest) > LONGEST_LINE:
                skipped, rest = skipped + len(rest), b""
        if whole:
            yield rest, end
