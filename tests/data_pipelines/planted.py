"""Collections with known duplicates: unrelated scenes and altered copies of them, drawn anew by seed."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.decode import read_image_file
from data_pipelines.prepare.duplicates import DuplicateRule, find_near_duplicates, fingerprint_image
from data_pipelines.synthetic import generate_scene


def altered_copies(image: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (kind, copy) of (H, W) uint8: compressed again, resized, brightness shifted, 2 % cropped."""
    picture = Image.fromarray(image)
    width, height = picture.size
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(rng.integers(30, 91)))
    yield "compressed", np.asarray(Image.open(buffer))
    scale = rng.uniform(0.5, 1.5)
    size = round(width * scale), round(height * scale)
    yield "resized", np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    shift = int(rng.integers(10, 41)) * int(rng.choice([-1, 1]))
    yield "brightness", np.clip(image.astype(int) + shift, 0, 255).astype(np.uint8)
    rows, columns = round(0.02 * height), round(0.02 * width)
    top, left = int(rng.integers(0, rows + 1)), int(rng.integers(0, columns + 1))
    yield "cropped", image[top : top + height - rows, left : left + width - columns]


def synthetic_scenes(count: int, seed: int) -> list[np.ndarray]:
    """Unrelated scenes by construction."""
    return [generate_scene(seed, index, (256, 320)).image for index in range(count)]


def real_scenes(data: Path, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns real images that are unrelated by their names, and others that may show one scene twice.

    Unrelated: one frame a flight (altitude, angle, time of day) of the aerial set, one picture a day of the animals.
    The others are one frame a video clip of the flying objects, whose clips share places.
    """
    rng = np.random.default_rng(seed)

    def one_of_each(folder: str, group: str) -> list[np.ndarray]:
        groups: dict[str, list[Path]] = {}
        for path in sorted((data / folder / "images").glob("*/*.jpg")):
            if match := re.search(group, path.name):
                groups.setdefault(match[1], []).append(path)
        return [read_image_file(paths[rng.integers(len(paths))]) for paths in groups.values()]

    unrelated = one_of_each("hit_uav", r"^(\d_\d+_\d+_\d)_") + one_of_each("buffalo_udder", r"_img_(\d{8})_")
    return unrelated, one_of_each("drone_ir", r"^IR_(\w+_\d+)_")


def search_planted(
    unrelated: list[np.ndarray], others: list[np.ndarray], rule: DuplicateRule, seed: int
) -> tuple[dict[str, float], float]:
    """Plants copies of every image and searches.

    Returns:
      recall by kind of copy (found: removed for its original or the original's anchor, or, for the others, for any of
      the others), and the share of the unrelated originals that were removed.
    """
    rng = np.random.default_rng(seed)
    originals = [*unrelated, *others]
    copies = [(kind, copy, index) for index, image in enumerate(originals) for kind, copy in altered_copies(image, rng)]
    prints = [fingerprint_image(image) for image in (*originals, *(copy for _, copy, _ in copies))]
    codes, features = np.array([code for code, _ in prints], np.uint64), np.stack([feature for _, feature in prints])
    near = enumerate(find_near_duplicates(codes, features, rule))
    anchor_of = {index: anchor for index, (anchor, _) in near if anchor != index}
    hits: dict[str, list[bool]] = {}
    for place, (kind, _, original) in enumerate(copies, start=len(originals)):
        anchor = anchor_of.get(place, -1)
        same_scene = anchor in (original, anchor_of.get(original))
        # Several of the others may show one place, so any of them is a right anchor for their copies.
        same_place = original >= len(unrelated) and len(unrelated) <= anchor
        hits.setdefault(kind, []).append(same_scene or same_place)
    recall = {kind: float(np.mean(found)) for kind, found in hits.items()}
    return recall, sum(index < len(unrelated) for index in anchor_of) / len(unrelated)
