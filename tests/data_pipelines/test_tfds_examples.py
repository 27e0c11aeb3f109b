"""Reading serialised examples: against the protocol buffer library, and never anything but a named error."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.records import CorruptRecord, Record, decode_record
from data_pipelines.tfds_examples import source_text

values = st.one_of(
    st.lists(st.binary(max_size=300), max_size=3),
    st.lists(st.floats(width=32, allow_nan=False), max_size=3),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
)


def serialise(features):
    example = tf_example_pb2.Example()
    for name, entries in features.items():
        feature = example.features.feature[name]
        if entries and isinstance(entries[0], bytes):
            feature.bytes_list.value.extend(entries)
        elif entries and isinstance(entries[0], float):
            feature.float_list.value.extend(entries)
        else:
            feature.int64_list.value.extend(entries)
    return example.SerializeToString()


def stored(record):
    return serialise(
        {"image": [record.payload], "key": [record.key.encode()], "source": [source_text(record).encode()]}
    )


RECORD = Record("train/ä b.png", bytes(range(256)) * 3, "png", 12, 64, 16, {"unit": "kelvin", "scale": 0.01})


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_record_comes_back_whole_whatever_is_beside_it(others):
    example = tf_example_pb2.Example.FromString(stored(RECORD))
    beside = tf_example_pb2.Example.FromString(serialise(others))
    for name in set(others) - {"image", "key", "source"}:
        example.features.feature[name].CopyFrom(beside.features.feature[name])
    assert decode_record(example.SerializeToString()) == RECORD


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_a_named_error(data):
    good = stored(RECORD)
    kind = data.draw(st.sampled_from(["cut", "flip", "random"]))
    if kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "flip":
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        bad = bytes(bad)
    else:
        bad = b"\x0a" + data.draw(st.binary(max_size=200))
    try:
        record = decode_record(bad)
    except CorruptRecord as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(record, Record)


@pytest.mark.parametrize(
    "features",
    [{}, {"image": [b"x"], "key": [b"k"]}, {"image": [b"x"], "key": [b"k"], "source": [b"[]"]},
     {"image": [b"x"], "key": [b"k"], "source": [b"{}"]}, {"image": [3], "key": [b"k"], "source": [b"{}"]},
     {"image": [b"x"], "key": [b"k"], "source": [source_text(RECORD).replace("png", "bmp").encode()]}],
)  # fmt: skip
def test_foreign_examples_are_refused(features):
    with pytest.raises(CorruptRecord):
        decode_record(serialise(features) or b"\x0a")


def test_speed_is_that_of_a_record():
    record = Record("k", np.random.default_rng(0).bytes(70_000), "jpeg", 512, 640, 8, {})
    data = stored(record)
    start = time.process_time()
    for _ in range(200):
        decode_record(data)
    assert (time.process_time() - start) / 200 < 1e-3  # about 40 microseconds on an idle core
