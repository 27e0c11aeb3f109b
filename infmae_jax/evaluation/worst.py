"""The images of an evaluation that came out worst, to be looked at."""

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Worst(Generic[T]):
    """Keeps those of lowest quality, at most `most`; of equal ones the earlier."""

    def __init__(self, most: int = 10):
        self._most, self._seen = most, 0
        self._kept: list[tuple[float, int, T]] = []

    def add(self, quality: float, item: T) -> None:
        self._seen += 1
        entry = (-quality, -self._seen, item)
        (heapq.heappush if len(self._kept) < self._most else heapq.heappushpop)(self._kept, entry)

    def items(self) -> list[T]:
        """The worst first."""
        return [item for *_, item in sorted(self._kept, key=lambda entry: entry[:2], reverse=True)]
