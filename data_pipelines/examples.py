"""What one stored example is: an image with its labels, as the `tf.train.Example` that TensorFlow Datasets writes.

Features of the protocol buffer:

    image               the encoded one-channel image
    key                 its name, unique in the split
    source              JSON: encoding, height, width, bit_depth, attributes
    mask                optional: PNG of class numbers, 255 = ignore
    objects/...         optional: bbox (ymin, xmin, ymax, xmax as shares of the image), label, area, is_crowd,
                        segmentation (JSON, polygons or RLE)
    label, label/NAME   optional: class numbers of the whole image

Other features are stepped over. TensorFlow is not needed: the messages are declared here, wire-compatible with its own.
The bytes are guarded by the hash that ArrayRecord keeps of every record on disk.
"""

import dataclasses
import io
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from PIL import Image

from data_pipelines.errors import InputError

IMAGE, KEY, SOURCE, MASK, LABEL = "image", "key", "source", "mask", "label"
BOXES, CLASSES, AREA, CROWD = "objects/bbox", "objects/label", "objects/area", "objects/is_crowd"
SEGMENTATION = "objects/segmentation"
ENCODINGS = ("jpeg", "png", "raw")
BIT_DEPTHS = (8, 16)
IGNORE = 255  # class number of a mask's pixels that belong to no class

_PACKAGE = "infmae_jax"
_OPTIONAL, _REPEATED = 1, 3
_FLOAT, _INT64, _STRING, _MESSAGE, _BYTES = 2, 3, 9, 11, 12
_SOURCE_NAMES = ("encoding", "height", "width", "bit_depth")
_LABEL_PREFIX = LABEL + "/"
_DECODER_ERRORS = (ValueError, OSError, SyntaxError, struct.error, Image.DecompressionBombError)


class CorruptExample(ValueError):
    """The bytes are not a stored example of this project, or were damaged."""


@dataclasses.dataclass(frozen=True, eq=False)
class Objects:
    """The n objects of an image.

    Attributes:
      boxes: (n, 4) float32: x0, y0, x1, y1 in pixels of the stored image; pixel i covers [i, i + 1).
      classes: (n,) int32 class numbers.
      crowd: (n,) bool: a group that is not told apart.
      area: (n,) float32, square pixels.
      segmentations: n texts of JSON (COCO polygons or RLE), or none.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    segmentations: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """One stored example.

    Attributes:
      key: posix path of the source relative to its input root, unique in the split.
      image: the encoded one-channel image.
      encoding: "jpeg" (the source's own bytes, never a second compression), "png" (lossless), or "raw" (the pixels
        themselves, row by row, little-endian).
      height, width: pixel rows H and columns W of the decoded image.
      bit_depth: 8 or 16, bits per pixel.
      attributes: JSON-able facts about the source, by name. `unit`, `scale` and `offset` are always usable through
        `source_units`: a stored integer v stands for v * scale + offset in the source's unit.
      mask: PNG of class numbers, (H, W) uint8, 255 = ignore; or None.
      objects: boxes and their classes; or None (unlike an image that was searched and holds none).
      labels: class numbers of the whole image, by name; the only one is named "label".
    """

    key: str
    image: bytes
    encoding: str
    height: int
    width: int
    bit_depth: int
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mask: bytes | None = None
    objects: Objects | None = None
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _example_class() -> type[Message]:
    """The message class of `tf.train.Example`."""
    file = descriptor_pb2.FileDescriptorProto(name="infmae_jax/example.proto", package=_PACKAGE, syntax="proto3")

    def add(message, name: str, number: int, label: int, kind: int, type_name: str | None = None) -> None:
        message.field.add(name=name, number=number, label=label, type=kind, type_name=type_name)

    feature = file.message_type.add(name="Feature")
    for number, (name, kind) in enumerate((("Bytes", _BYTES), ("Float", _FLOAT), ("Int64", _INT64)), start=1):
        add(file.message_type.add(name=f"{name}List"), "value", 1, _REPEATED, kind)
        add(feature, f"{name.lower()}_list", number, _OPTIONAL, _MESSAGE, f".{_PACKAGE}.{name}List")
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, _OPTIONAL, _STRING)
    add(entry, "value", 2, _OPTIONAL, _MESSAGE, f".{_PACKAGE}.Feature")
    add(features, "feature", 1, _REPEATED, _MESSAGE, f".{_PACKAGE}.Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, _OPTIONAL, _MESSAGE, f".{_PACKAGE}.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


_Message = _example_class()


def source_units(attributes: Mapping[str, Any]) -> tuple[float, float, str]:
    """Returns (scale, offset, unit) of an example: a stored integer v is v * scale + offset in the source's unit."""
    return float(attributes.get("scale", 1.0)), float(attributes.get("offset", 0.0)), attributes.get("unit", "count")


def source_text(example: Example) -> str:
    """The feature `source`: JSON, the same text for the same example."""
    header = {name: getattr(example, name) for name in _SOURCE_NAMES} | {"attributes": dict(example.attributes)}
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def encode_example(example: Example) -> bytes:
    """Returns the stored bytes of an example. The same example always gives the same bytes."""
    message = _Message()
    features = message.features.feature

    def add(name: str, kind: str, values: Any) -> None:
        getattr(features[name], kind).value.extend(values)
        getattr(features[name], kind).SetInParent()  # an empty list is there, too

    add(IMAGE, "bytes_list", [example.image])
    add(KEY, "bytes_list", [example.key.encode()])
    add(SOURCE, "bytes_list", [source_text(example).encode()])
    if example.mask is not None:
        add(MASK, "bytes_list", [example.mask])
    for name, number in example.labels.items():
        add(name if name == LABEL else _LABEL_PREFIX + name, "int64_list", [number])
    if (objects := example.objects) is not None:
        sides = _sides(example.height, example.width)
        add(BOXES, "float_list", (np.float64(objects.boxes)[:, [1, 0, 3, 2]] / sides).ravel().tolist())
        add(CLASSES, "int64_list", objects.classes.tolist())
        add(AREA, "float_list", objects.area.tolist())
        add(CROWD, "int64_list", objects.crowd.astype(int).tolist())
        if objects.segmentations:
            add(SEGMENTATION, "bytes_list", [text.encode() for text in objects.segmentations])
    return message.SerializeToString(deterministic=True)


def decode_example(data: bytes) -> Example:
    """Returns the example that `encode_example`, or TensorFlow Datasets for a builder of this project, stored.

    Raises:
      CorruptExample: the bytes are not such an example, or were damaged.
    """
    try:
        features = _Message.FromString(data).features.feature
        image, key, source = (_first_bytes(features, name) for name in (IMAGE, KEY, SOURCE))
        header = json.loads(source)
        sides = header["height"], header["width"]
        if header["encoding"] not in ENCODINGS or header["bit_depth"] not in BIT_DEPTHS:
            raise ValueError(f"unknown encoding {header['encoding']!r} or bit depth {header['bit_depth']!r}")
        if not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"size {header['width']!r}x{header['height']!r}")
        if not isinstance(header["attributes"], dict):
            raise ValueError("its attributes are not a JSON object")
        return Example(
            key=key.decode(),
            image=image,
            **{name: header[name] for name in _SOURCE_NAMES},
            attributes=header["attributes"],
            mask=_first_bytes(features, MASK) if MASK in features else None,
            objects=_objects(features, *sides) if BOXES in features else None,
            labels={
                name.removeprefix(_LABEL_PREFIX): int(features[name].int64_list.value[0])
                for name in sorted(features)
                if name == LABEL or name.startswith(_LABEL_PREFIX)
            },
        )
    except (DecodeError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptExample(f"the example is not usable: {' '.join(str(error).split())}") from error


def _first_bytes(features: Mapping[str, Message], name: str) -> bytes:
    if name not in features or not features[name].bytes_list.value:
        raise ValueError(f"it has no {name}, so it is not of this project")
    return features[name].bytes_list.value[0]


def _sides(height: int, width: int) -> np.ndarray:
    """Pixels of a whole side, for each number of a stored box."""
    return np.array([height, width, height, width], np.float64)


def _objects(features: Mapping[str, Message], height: int, width: int) -> Objects:
    shares = np.array(features[BOXES].float_list.value, np.float64).reshape(-1, 4)
    if not np.isfinite(shares).all():
        raise ValueError("a box is not finite")
    count = len(shares)

    def read(name: str, kind: str, dtype: type, default: np.ndarray) -> np.ndarray:
        values = np.array(getattr(features[name], kind).value, dtype) if name in features else default
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} values for {count} boxes")
        return values

    boxes = np.float32((shares * _sides(height, width))[:, [1, 0, 3, 2]])
    extents = boxes[:, 2:] - boxes[:, :2]
    texts = tuple(text.decode() for text in features[SEGMENTATION].bytes_list.value) if SEGMENTATION in features else ()
    if len(texts) not in (0, count):
        raise ValueError(f"{SEGMENTATION} has {len(texts)} values for {count} boxes")
    return Objects(
        boxes=boxes,
        classes=read(CLASSES, "int64_list", np.int32, np.zeros(count, np.int32)),
        crowd=read(CROWD, "int64_list", np.bool_, np.zeros(count, np.bool_)),
        area=read(AREA, "float_list", np.float32, extents[:, 0] * extents[:, 1]),
        segmentations=texts,
    )


def decode_pixels(example: Example) -> np.ndarray:
    """Returns the stored pixels of an example, (H, W) uint8 or uint16; read-only where the encoding is "raw".

    Raises:
      CorruptExample: the image does not decode, or not to the size and depth that the example states.
    """
    dtype = np.dtype("u1" if example.bit_depth == 8 else "<u2")
    return _decoded(example, "image", example.image, example.encoding, dtype)


def decode_mask(example: Example) -> np.ndarray:
    """Returns the class mask of an example, (H, W) uint8.

    Raises:
      CorruptExample: it does not decode, or not to the image's size.
      InputError: the example has none.
    """
    if example.mask is None:
        raise InputError(f"{example.key} has no class mask: choose a shard set with masks")
    return _decoded(example, "mask", example.mask, "png", np.uint8)


def objects_of(example: Example) -> Objects:
    """Returns the objects of an example, of which there may be none; InputError where nobody looked for them."""
    if example.objects is None:
        raise InputError(f"{example.key} has no list of objects: choose a shard set with boxes")
    return example.objects


def _decoded(example: Example, what: str, data: bytes, encoding: str, dtype: Any) -> np.ndarray:
    try:
        if encoding == "jpeg":
            pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)[..., 0]
        elif encoding == "raw":
            pixels = np.frombuffer(data, dtype).reshape(example.height, example.width)
        else:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                pixels = np.asarray(image)
    except _DECODER_ERRORS as error:
        raise CorruptExample(f"{example.key}: the stored {what} does not decode ({error})") from error
    if pixels.shape != (example.height, example.width) or pixels.dtype != dtype:
        stated = f"{example.width}x{example.height} of {example.bit_depth} bit"
        raise CorruptExample(f"{example.key}: stored as {stated}, a {what} of shape {pixels.shape} of {pixels.dtype}")
    return pixels
