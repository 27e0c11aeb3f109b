"""Fills a cache with images that follow from their number, over and over into what is missing, until it is killed.

    python -m tests.data_pipelines.fill_cache FOLDER COUNT FIRST STEP

Prints "filling" after the first image, and "full" when all from FIRST on, each STEP-th, are there.
"""

import sys

import numpy as np

from data_pipelines.image_cache import ImageCache, open_caches
from data_pipelines.records import Manifest

SHAPE = (300, 320)


def image(number: int) -> np.ndarray:
    """(300, 320) uint8, different in every byte's neighbourhood from all other images."""
    return np.random.default_rng(number).integers(0, 256, SHAPE, dtype=np.uint8)


def open_cache(folder, count: int) -> ImageCache:
    manifest = Manifest(count, (), {f"{SHAPE[1]}x{SHAPE[0]}": count}, {"8": count}, 0.4, 0.2, 6.5, "fingerprint")
    return open_caches(folder, [manifest], "auto")[0]


def main(folder: str, count: str, first: str, step: str) -> None:
    cache = open_cache(folder, int(count))
    images = {number: image(number) for number in range(int(first), int(count), int(step))}
    for done, (number, pixels) in enumerate(images.items()):
        if done == 1:
            print("filling", flush=True)
        if cache.find(number) is None:
            cache.store(number, pixels)
    print("full", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
