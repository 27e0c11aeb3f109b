"""Which record is sample g of a run: shuffled anew every epoch, shard sets mixed by weight. A pure function of g."""

from collections.abc import Sequence

import numpy as np


class RecordOrder:
    """Maps global sample positions to record indices.

    Without weights the sets are joined: every record comes once an epoch. With weights each set runs through epochs of
    its own, and after any number of samples its share is right to within one sample a set.
    An epoch's permutation is kept in memory: 4 bytes a record.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int):
        """Sets of `counts` records, numbered one set after the other; `weights` empty or one a set."""
        self._counts = list(counts) if weights else [sum(counts)]
        self._starts = np.cumsum([0, *self._counts[:-1]])
        # Share of each set among itself and those after it.
        self._shares = [weight / sum(weights[k:]) for k, weight in enumerate(weights)] or [1.0]
        self._seed = seed
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def indices(self, start: int, count: int) -> np.ndarray:
        """Record indices of the samples start, ..., start + count - 1: (count,) int64."""
        out = np.empty(count, np.int64)
        places, position = np.arange(count), np.arange(start, start + count)
        for number, share in enumerate(self._shares):
            # The set takes a sample whenever its due number, rounded down, grows; the others split what is left.
            before = np.floor(position * share).astype(np.int64)
            taken = np.floor((position + 1) * share).astype(np.int64) > before
            out[places[taken]] = self._in_set(number, before[taken])
            places, position = places[~taken], (position - before)[~taken]
        return out

    def _in_set(self, number: int, position: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(position, self._counts[number])
        out = np.empty(len(position), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permutation(number, int(epoch))[within[here]]
        return out + self._starts[number]

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        key = number, epoch
        permutation = self._permutations.get(key)
        if permutation is None:
            # A spawn key, as the generators of samples are seeded with lists: [s, 1] and [s, 1, 0] would be the same.
            rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(number, epoch)))
            permutation = rng.permutation(np.arange(self._counts[number], dtype=np.uint32))
            self._permutations[key] = permutation
            # Batches that are made at the same time span two epochs at most.
            self._permutations.pop((number, epoch - 2), None)
        return permutation
