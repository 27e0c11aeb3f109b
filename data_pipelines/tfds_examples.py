"""Reads a record of this project from the bytes that TensorFlow Datasets stores, without TensorFlow or its datasets.

TFDS writes every example as a `tf.train.Example` protocol buffer. Training needs three of its features; they are picked
out here directly, so that reading a built set costs no import and no parsing of boxes and masks.

    Example   { features = 1: Features }        Feature   { bytes_list = 1, float_list = 2, int64_list = 3 }
    Features  { feature = 1: map entries }      BytesList { value = 1: bytes }
    map entry { key = 1: string, value = 2: Feature }
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from data_pipelines.records import CorruptRecord, Record

IMAGE, KEY, SOURCE = "image", "key", "source"

_BYTES = 2  # wire type: length-delimited
_FIXED_SIZES = {1: 8, 5: 4}


def source_text(record: Record) -> str:
    """What the stored example says about its image beside key and bytes: JSON, the same text for the same record."""
    header = {
        "encoding": record.encoding,
        "height": record.height,
        "width": record.width,
        "bit_depth": record.bit_depth,
        "attributes": dict(record.attributes),
    }
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def decode_example(data: bytes) -> Record:
    """Returns the record in a serialised `tf.train.Example` of one of this project's builders.

    Raises:
      CorruptRecord: the bytes are not such an example, or were damaged.
    """
    try:
        features = bytes_features(data, (IMAGE, KEY, SOURCE))
        return Record(key=features[KEY].decode(), payload=features[IMAGE], **json.loads(features[SOURCE]))
    except KeyError as error:
        raise CorruptRecord(f"the example has no feature {error}: it is not of a builder of this project") from error
    except (IndexError, ValueError, TypeError) as error:
        raise CorruptRecord(f"the example is not usable: {error}") from error


def bytes_features(data: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """The first bytes value of each named feature that the serialised Example has one of.

    Raises:
      IndexError, ValueError: the bytes are no protocol buffer.
    """
    wanted = {name.encode(): name for name in names}
    found: dict[str, bytes] = {}
    view = memoryview(data)
    for features in _messages(view, 1):
        for entry in _messages(features, 1):
            name = next(_messages(entry, 1), b"")
            if bytes(name) in wanted:
                for feature in _messages(entry, 2):
                    for values in _messages(feature, 1):
                        for value in _messages(values, 1):
                            found.setdefault(wanted[bytes(name)], bytes(value))
    return found


def _messages(view: memoryview, field: int) -> Iterator[memoryview]:
    """The length-delimited values of a field, in order; other fields are stepped over."""
    position, end = 0, len(view)
    while position < end:
        tag, position = _varint(view, position)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _varint(view, position)
            if position + size > end:
                raise ValueError(f"a value of {size} bytes does not fit into the {end - position} left")
            if tag >> 3 == field:
                yield view[position : position + size]
            position += size
        elif kind == 0:
            _, position = _varint(view, position)
        elif kind in _FIXED_SIZES:
            position += _FIXED_SIZES[kind]
        else:
            raise ValueError(f"wire type {kind} is unknown")


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bit")
