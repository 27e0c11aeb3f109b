"""Reads a record of this project from the bytes that TensorFlow Datasets stores, without TensorFlow or its datasets.

TFDS writes every example as a `tf.train.Example` protocol buffer. Training needs three of its features, all bytes. The
messages are declared here as far as needed, wire-compatible with TensorFlow's own; what else an example holds (boxes,
masks) is stepped over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from data_pipelines.records import CorruptRecord, Record

IMAGE, KEY, SOURCE = "image", "key", "source"

_PACKAGE = "infmae_jax"
_OPTIONAL, _REPEATED = 1, 3
_STRING, _MESSAGE, _BYTES = 9, 11, 12


def _example_class() -> type[Message]:
    """The message class of an Example whose features are bytes lists."""
    file = descriptor_pb2.FileDescriptorProto(name="infmae_jax/tfds_example.proto", package=_PACKAGE, syntax="proto3")

    def add(message, name: str, number: int, label: int, kind: int, type_name: str | None = None) -> None:
        message.field.add(name=name, number=number, label=label, type=kind, type_name=type_name)

    add(file.message_type.add(name="BytesList"), "value", 1, _REPEATED, _BYTES)
    add(file.message_type.add(name="Feature"), "bytes_list", 1, _OPTIONAL, _MESSAGE, f".{_PACKAGE}.BytesList")
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


_Example = _example_class()


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
        features = _Example.FromString(data).features.feature
        image, key, source = (_first_bytes(features, name) for name in (IMAGE, KEY, SOURCE))
        return Record(key=key.decode(), payload=image, **json.loads(source))
    except (DecodeError, ValueError, TypeError) as error:
        raise CorruptRecord(f"the example is not usable: {error}") from error


def _first_bytes(features: Mapping[str, Message], name: str) -> bytes:
    if name not in features or not features[name].bytes_list.value:
        raise ValueError(f"it has no {name}, so it is not of a builder of this project")
    return features[name].bytes_list.value[0]
