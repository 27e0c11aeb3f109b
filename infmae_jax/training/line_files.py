"""Files of lines, as long runs make them: appended to whole or not at all, read from the end, in bounded memory."""

import functools
import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_LINE = 1 << 20  # bytes; no line of ours comes near


class AppendOnlyFile:
    """A file to which whole pieces are appended: after a failure (OSError) it is as long as before.

    Unbuffered, so that the process can be killed at any time, and opened when first used, so that opening can be tried
    anew.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def size(self) -> int:
        """Bytes of what was appended whole."""
        _ = self._file  # opened by now
        return self._end

    def append(self, data: bytes) -> None:
        file = self._file
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
        self._file.truncate(end)
        self._end = end

    def close(self) -> None:
        if "_file" in vars(self):
            self._file.close()
            del self._file

    @functools.cached_property
    def _file(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "ab", buffering=0)
        # A process killed while it wrote leaves a piece of a line, which the next line must not continue.
        self._end = next((end for _, end in lines_from_the_end(self.path)), 0)
        file.truncate(self._end)
        return file


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
    """(line, offset of the byte after its line feed) of the whole lines of a file, the last one first.

    Of a line that is too long, the beginning."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as data:
        end = data.rfind(b"\n") + 1
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            yield data[start : min(end - 1, start + LONGEST_LINE)], end
            end = start
