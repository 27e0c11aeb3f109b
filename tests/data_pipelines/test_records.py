"""Stored examples and shard sets: round trips, damage, random access."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from data_pipelines.records import (
    CorruptRecord,
    Manifest,
    Record,
    decode_record,
    encode_record,
    fingerprint_shards,
    open_source,
    read_manifest,
    verify_shards,
    write_manifest,
    write_shard,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
records = st.builds(
    Record,
    key=st.text(),
    payload=st.binary(max_size=200),
    encoding=st.sampled_from(("jpeg", "png")),
    height=st.integers(1, 10_000),
    width=st.integers(1, 10_000),
    bit_depth=st.sampled_from((8, 16)),
    attributes=st.dictionaries(st.text(), json_values, max_size=3),
)


def example(index: int, size: int = 50) -> bytes:
    return encode_record(Record(f"folder/{index}.png", bytes([index % 256]) * size, "png", 4, 5, 8))


def write_set(folder, counts):
    folder.mkdir()
    shards, start = [], 0
    for number, count in enumerate(counts):
        shards.append(
            write_shard(folder / f"images-{number:05d}.array_record", map(example, range(start, start + count)))
        )
        start += count
    manifest = Manifest(start, tuple(shards), {"5x4": start}, {"8": start}, 0.5, 0.1, 3.0, fingerprint_shards(shards))
    write_manifest(folder, manifest)
    return manifest


@given(records)
def test_record_round_trip(record):
    assert decode_record(encode_record(record)) == record
    assert encode_record(decode_record(encode_record(record))) == encode_record(record)


@given(records, st.data())
def test_cut_record_is_refused(record, data):
    stored = encode_record(record)
    with pytest.raises(CorruptRecord):
        decode_record(stored[: data.draw(st.integers(0, len(stored) - 1))])


@given(records, st.data())
def test_damaged_header_is_refused(record, data):
    stored = bytearray(encode_record(record))
    header_end = len(stored) - len(record.payload)
    stored[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptRecord):
        decode_record(bytes(stored))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises(CorruptRecord):
        decode_record(data)


def test_manifest_round_trip(tmp_path):
    manifest = write_set(tmp_path / "set", [3, 2])
    assert read_manifest(tmp_path / "set") == manifest
    verify_shards(tmp_path / "set")


def test_same_records_give_same_bytes(tmp_path):
    assert write_set(tmp_path / "a", [3, 2]) == write_set(tmp_path / "b", [3, 2])


def test_source_reads_all_sets_in_order_and_survives_pickle(tmp_path):
    write_set(tmp_path / "a", [3, 2])
    write_set(tmp_path / "b", [4])
    source = open_source([tmp_path / "a", tmp_path / "b"])
    expected = [*map(example, range(5)), *map(example, range(4))]
    assert len(source) == 9
    assert list(source) == expected
    assert source[-1] == expected[-1]
    assert [pickle.loads(pickle.dumps(source))[i] for i in (8, 0, 4)] == [expected[i] for i in (8, 0, 4)]
    with pytest.raises(IndexError):
        source[9]


def test_damaged_shard_is_named_and_other_records_still_read(tmp_path):
    write_set(tmp_path / "a", [5])
    path = tmp_path / "a" / "images-00000.array_record"
    stored = bytearray(path.read_bytes())
    stored[stored.index(bytes([2]) * 50) + 10] ^= 1
    path.write_bytes(stored)
    source = open_source(tmp_path / "a")
    with pytest.raises(CorruptRecord, match="record 2 of .*images-00000"):
        source[2]
    assert [source[i] for i in (0, 1, 3, 4)] == [example(i) for i in (0, 1, 3, 4)]
    with pytest.raises(InputError, match="images-00000.array_record differs"):
        verify_shards(tmp_path / "a")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": 99}', '{"version": 1, "shards": []}'])
def test_unusable_manifest_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError) as error:
        open_source(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_shard_is_named(tmp_path):
    write_set(tmp_path / "a", [2, 2])
    (tmp_path / "a" / "images-00001.array_record").unlink()
    with pytest.raises(InputError, match="images-00001"):
        open_source(tmp_path / "a")
