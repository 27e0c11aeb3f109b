"""Reading serialised examples: against the protocol buffer library, and never anything but a named error."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.examples import (
    CorruptExample,
    Example,
    Objects,
    decode_example,
    decode_mask,
    decode_pixels,
    encode_example,
    source_text,
)
from tests.data_pipelines.shard_sets import make_example

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
    """As TensorFlow Datasets would."""
    return serialise(
        {"image": [record.image], "key": [record.key.encode()], "source": [source_text(record).encode()]}
    )


KNOWN = {"image", "key", "source", "mask", "label", "objects/bbox"}
RECORD = Example("train/ä b.png", bytes(range(256)) * 3, "png", 12, 64, 16, {"unit": "kelvin", "scale": 0.01})


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_record_comes_back_whole_whatever_is_beside_it(others):
    example = tf_example_pb2.Example.FromString(stored(RECORD))
    beside = tf_example_pb2.Example.FromString(serialise(others))
    for name in set(others) - KNOWN:
        example.features.feature[name].CopyFrom(beside.features.feature[name])
    assert decode_example(example.SerializeToString()) == RECORD


@settings(deadline=None)
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
        record = decode_example(bad)
    except CorruptExample as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(record, Example)


@pytest.mark.parametrize(
    "features",
    [{}, {"image": [b"x"], "key": [b"k"]}, {"image": [b"x"], "key": [b"k"], "source": [b"[]"]},
     {"image": [b"x"], "key": [b"k"], "source": [b"{}"]}, {"image": [3], "key": [b"k"], "source": [b"{}"]},
     {"image": [b"x"], "key": [b"k"], "source": [source_text(RECORD).replace("png", "bmp").encode()]}],
)  # fmt: skip
def test_foreign_examples_are_refused(features):
    with pytest.raises(CorruptExample):
        decode_example(serialise(features) or b"\x0a")


def test_speed_is_that_of_a_record():
    record = Example("k", np.random.default_rng(0).bytes(70_000), "jpeg", 512, 640, 8, {})
    data = stored(record)
    start = time.process_time()
    for _ in range(200):
        decode_example(data)
    assert (time.process_time() - start) / 200 < 1e-3  # about 40 microseconds on an idle core


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
plain_examples = st.builds(
    Example,
    key=st.text(),
    image=st.binary(max_size=200),
    encoding=st.sampled_from(("jpeg", "png", "raw")),
    height=st.integers(1, 10_000),
    width=st.integers(1, 10_000),
    bit_depth=st.sampled_from((8, 16)),
    attributes=st.dictionaries(st.text(), json_values, max_size=3),
    mask=st.none() | st.binary(max_size=50),
    labels=st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "label"), st.integers(-1, 2**40)
    ),
)


@settings(deadline=None)
@given(plain_examples)
def test_round_trip(example):
    assert decode_example(encode_example(example)) == example
    assert encode_example(decode_example(encode_example(example))) == encode_example(example)


@settings(deadline=None)
@given(plain_examples, st.data())
def test_a_cut_example_is_refused_or_lacks_nothing_that_it_needs(example, data):
    stored_bytes = encode_example(example)
    try:
        got = decode_example(stored_bytes[: data.draw(st.integers(0, len(stored_bytes) - 1))])
    except CorruptExample:
        return
    # A cut between two features: what is left is an example. ArrayRecord's hash finds that on disk.
    assert isinstance(got, Example)


@settings(deadline=None)
@given(st.integers(0, 5), st.booleans(), st.data())
def test_objects_come_back(count, segmented, data):
    numbers = st.lists(st.floats(0, 64, width=32), min_size=4, max_size=4)
    boxes = np.array([data.draw(numbers) for _ in range(count)], np.float32).reshape(-1, 4)
    texts = tuple(f"[[{i}, 0, 1.5, 2, 3, 4]]" for i in range(count)) if segmented else ()
    crowd = np.arange(count) % 2 == 1
    objects = Objects(boxes, np.arange(count, dtype=np.int32), crowd, np.ones(count, np.float32) * 2.5, texts)
    example = Example("k", b"x", "png", 48, 64, 8, objects=objects, labels={"label": 3})
    got = decode_example(encode_example(example)).objects
    np.testing.assert_allclose(got.boxes, boxes, rtol=2e-7, atol=1e-5)
    for name in ("classes", "crowd", "area"):
        np.testing.assert_array_equal(getattr(got, name), getattr(objects, name), strict=True)
    assert got.segmentations == texts and got.boxes.shape == (count, 4) and got.boxes.dtype == np.float32
    message = tf_example_pb2.Example.FromString(encode_example(example)).features.feature
    shares = np.reshape(message["objects/bbox"].float_list.value, (-1, 4))  # TFDS: ymin, xmin, ymax, xmax
    np.testing.assert_allclose(shares, boxes[:, [1, 0, 3, 2]] / [48, 64, 48, 64], atol=1e-6)
    assert list(message["label"].int64_list.value) == [3]


@pytest.mark.parametrize(
    "change", [{"objects/label": [1]}, {"objects/bbox": [0.1] * 7}, {"objects/is_crowd": [1, 0, 1]}]
)
def test_objects_that_contradict_themselves_are_refused(change):
    features = {"objects/bbox": [0.1, 0.1, 0.2, 0.2] * 2, "objects/label": [1, 2], "objects/is_crowd": [0, 0]} | change
    with pytest.raises(CorruptExample):
        decode_example(stored(RECORD) + serialise(features))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_raw_pixels_are_rows_of_little_endian_numbers(dtype):
    pixels = np.arange(6, dtype=dtype).reshape(2, 3) * 40
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    example = Example("k", data, "raw", 2, 3, 8 * pixels.dtype.itemsize)
    got = decode_pixels(decode_example(encode_example(example)))
    np.testing.assert_array_equal(got, pixels)
    with pytest.raises(CorruptExample, match="k: the stored image does not decode"):
        decode_pixels(Example("k", data[:-1], "raw", 2, 3, 8 * pixels.dtype.itemsize))


def test_a_mask_of_another_size_is_corrupt():
    other = make_example("m", np.zeros((4, 5), np.uint8), "png")
    assert (decode_mask(Example("k", b"", "png", 4, 5, 8, mask=other.image)) == 0).all()
    with pytest.raises(CorruptExample, match="a mask of shape"):
        decode_mask(Example("k", b"", "png", 5, 4, 8, mask=other.image))
