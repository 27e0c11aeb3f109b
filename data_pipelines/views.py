"""What a sample is: how an example becomes the arrays that a task is given.

Shape letters: b samples, H W rows and columns of the canvas, K visible tokens, M most objects per image.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE, Example, Objects, decode_mask, decode_pixels, objects_of
from data_pipelines.intensity import Intensity
from data_pipelines.masking import MaskConfig, num_visible, select_visible, token_grid, token_scores
from data_pipelines.outlines import mask_in_box, outline
from data_pipelines.transforms import Geometry, InfraredAugment, draw_crop, infrared_augment

Spec = Mapping[str, tuple[tuple[int, ...], Any]]
WHOLE = ("center", "stretch", "fit")


@dataclasses.dataclass(frozen=True)
class View:
    """Makes samples: what is common to all views. Picklable, as worker processes use it.

    Attributes:
      spec: name -> shape and dtype of every array of one sample.
      size: rows and columns of the canvas.
      whole: "center", "stretch" or "fit" (see `transforms.Geometry`): the whole image, without randomness; "" for a
        random crop.
      scale, ratio, flip: of the random crop.
      augment: infrared augmentations.
      intensity: stored integers to 8 bit.
      zoom: least and greatest factor by which a crop is enlarged, see `Geometry.zoomed`, in place of `scale` and
        `ratio`; () is off.
    """

    spec: ClassVar[Spec]
    size: tuple[int, int]
    whole: str = ""
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    augment: InfraredAugment = dataclasses.field(default_factory=InfraredAugment)
    intensity: Intensity = dataclasses.field(default_factory=Intensity)
    zoom: tuple[float, ...] = ()

    def __post_init__(self):
        if self.whole and self.whole not in WHOLE:
            raise InputError(f"view {self.whole!r} is unknown; choose one of {', '.join(WHOLE)}, or none for crops")
        if self.zoom and not (len(self.zoom) == 2 and 0 < self.zoom[0] <= self.zoom[1] < math.inf):
            raise InputError(f"zoom={self.zoom} must be two factors above 0, the smaller first, such as 0.5,2")

    def geometry(self, height: int, width: int, rng: np.random.Generator | None = None) -> Geometry:
        """How an image of this size comes to lie on the canvas; it asks a sample's generator first.

        Random crops are those of `draw_crop`, or zoomed ones, mirrored half of the time where `flip` is set.
        `rng` is needed by random crops alone. For predictions: `Geometry.points_back`.
        """
        if self.whole:
            return getattr(Geometry, self.whole)(height, width, self.size)
        if self.zoom:
            return Geometry.zoomed(rng, height, width, self.size, self.zoom, self.flip)
        crop = draw_crop(rng, height, width, self.scale, self.ratio)
        return Geometry(crop, self.size, self.size, mirrored=self.flip and rng.random() < 0.5)

    def sample(self, example: Example, geometry: Geometry, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of `spec` for one example; those that are missing are made by `finish`.

        Raises:
          CorruptExample: the example is damaged.
        """
        pixels = self.intensity.apply(decode_pixels(example), example.attributes)
        return {"image": infrared_augment(geometry.image(pixels), rng, self.augment)[..., None]}

    def finish(self, batch: dict[str, np.ndarray], generators: Sequence[np.random.Generator]) -> None:
        """Fills in what is made for a whole batch at once; `generators` are those of its samples, after `sample`."""


@dataclasses.dataclass(frozen=True)
class PretrainView(View):
    """`image` (H, W, 1) uint8 and `ids_keep` (K,) int32: a crop and its visible tokens, chosen as `mask` says."""

    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)

    @property
    def spec(self) -> Spec:
        rows, columns = token_grid(*self.size)
        visible = num_visible(self.mask, rows * columns)
        return {"image": ((*self.size, 1), np.uint8), "ids_keep": ((visible,), np.int32)}

    def finish(self, batch: dict[str, np.ndarray], generators: Sequence[np.random.Generator]) -> None:
        scores = token_scores(batch["image"][..., 0], self.mask)
        if self.mask.selection == "random":
            for ids_keep, score, rng in zip(batch["ids_keep"], scores, generators, strict=True):
                ids_keep[:] = select_visible(score, self.mask, rng)
        else:
            batch["ids_keep"][:] = select_visible(scores, self.mask)


@dataclasses.dataclass(frozen=True)
class LabelledView(View):
    """`image` (H, W, 1) uint8 and the labels that are asked for, moved with it.

    Arrays beside `image`: `mask` (H, W) uint8, 255 = ignore or padding; `boxes` (M, 4) float32 x0, y0, x1, y1 on the
    canvas, `classes` (M,) int32, `crowd` (M,) bool and `box_valid` (M,) bool; with boxes `size` (2,) int32: rows and
    columns, from the first corner on, that are image and not padding; `outlines` (M, S, S) uint8: what of each box is
    the object, all of it where there is no outline; for every name in `labels` an int32 scalar, -1 where an example
    lacks it.

    Attributes beside those of `View`:
      focus: probability that a zoomed crop contains a pixel of a class drawn evenly among those of the mask that are
        not 0, the background (without a mask: the centre of an object, of a class drawn so): for rare classes and small
        targets.
      mask: give the class mask; an example without one is an error.
      max_objects: M; 0 gives no boxes. More valid boxes are an error that names the image, never cut.
      outlines: S; 0 gives none.
      min_visible: boxes with less than this share of their area on the canvas are left out.
      labels: names of labels of the whole image.
    """

    focus: float = 0.0
    mask: bool = False
    max_objects: int = 0
    outlines: int = 0
    min_visible: float = 0.0
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.focus <= 1:
            raise InputError(f"focus={self.focus} is a probability; use a value from 0 to 1")

    @property
    def spec(self) -> Spec:
        spec: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((*self.size, 1), np.uint8)}
        if self.mask:
            spec["mask"] = (self.size, np.uint8)
        if self.max_objects:
            spec["boxes"] = ((self.max_objects, 4), np.float32)
            spec |= {name: ((self.max_objects,), dtype) for name, dtype in _OF_BOXES.items()}
            spec["size"] = ((2,), np.int32)
            if self.outlines:
                spec["outlines"] = ((self.max_objects, self.outlines, self.outlines), np.uint8)
        return spec | {name: ((), np.int32) for name in self.labels}

    def sample(self, example: Example, geometry: Geometry, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self.focus and self.zoom and rng.random() < self.focus:
            geometry = self._focused(example, geometry, rng)
        if self.max_objects and geometry.mirrored:
            # Padding belongs behind the image, in mirrored crops, too.
            geometry = dataclasses.replace(geometry, offset=(geometry.offset[0], self.size[1] - geometry.size[1]))
        arrays: dict[str, Any] = super().sample(example, geometry, rng)
        if self.mask:
            arrays["mask"] = geometry.mask(decode_mask(example))
        if self.max_objects:
            arrays |= self._objects(example, geometry)
        return arrays | {name: np.int32(example.labels.get(name, -1)) for name in self.labels}

    def _focused(self, example: Example, geometry: Geometry, rng: np.random.Generator) -> Geometry:
        """Another crop, around a pixel or an object of a class; the same one where there is none."""
        place = self._pixel(example, rng) if self.mask else _centre(example, rng)
        if place is None:
            return geometry
        return Geometry.zoomed(rng, example.height, example.width, self.size, self.zoom, self.flip, place)

    def _pixel(self, example: Example, rng: np.random.Generator) -> tuple[int, int] | None:
        mask = decode_mask(example)
        classes = np.setdiff1d(np.unique(mask), (0, IGNORE))
        if not classes.size:
            return None
        places = np.argwhere(mask == rng.choice(classes))
        row, column = places[rng.integers(len(places))].tolist()
        return row, column

    def _objects(self, example: Example, geometry: Geometry) -> dict[str, np.ndarray]:
        objects = objects_of(example)
        boxes, valid = geometry.boxes(objects.boxes, self.min_visible)
        count = int(valid.sum())
        if count > self.max_objects:
            raise InputError(f"{example.key} shows {count} objects, more than max_objects={self.max_objects}: raise it")
        kept = {"boxes": boxes, "classes": objects.classes, "crowd": objects.crowd, "box_valid": valid}
        kept = {name: of[valid] for name, of in kept.items()}
        if self.outlines:
            kept["outlines"] = self._outlines(objects, geometry, boxes, np.flatnonzero(valid))
        padding = [(0, self.max_objects - count)]
        padded = {name: np.pad(of, padding + [(0, 0)] * (of.ndim - 1)) for name, of in kept.items()}
        return padded | {"size": np.minimum(geometry.size, self.size).astype(np.int32)}

    def _outlines(self, objects: Objects, geometry: Geometry, boxes: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """(n, S, S) uint8 of the n objects `shown`."""
        masks = np.ones((len(shown), self.outlines, self.outlines), np.uint8)
        for mask, number in zip(masks, shown.tolist(), strict=True):
            found = outline(objects.segmentations[number], objects.boxes[number]) if objects.segmentations else None
            if found is not None:
                mask[:] = mask_in_box(found, geometry, boxes[number], self.outlines)
        return masks


def _centre(example: Example, rng: np.random.Generator) -> tuple[int, int] | None:
    """Row and column of the centre of an object that is no crowd."""
    objects = example.objects
    if objects is None or objects.crowd.all():
        return None
    single = np.flatnonzero(~objects.crowd)
    number = rng.choice(np.unique(objects.classes[single]))
    chosen = rng.choice(single[objects.classes[single] == number])
    x0, y0, x1, y1 = objects.boxes[chosen].tolist()
    return min(int((y0 + y1) / 2), example.height - 1), min(int((x0 + x1) / 2), example.width - 1)


_OF_BOXES = {"classes": np.int32, "crowd": np.bool_, "box_valid": np.bool_}
