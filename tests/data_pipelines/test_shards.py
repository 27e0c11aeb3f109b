"""Shard sets: manifests that may come from strangers, random access, damage, and trouble that is no damage."""

import json
import os
import pickle
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import shards
from data_pipelines.errors import InputError
from data_pipelines.examples import CorruptExample, Example, encode_example
from data_pipelines.shards import (
    Manifest,
    ShardReader,
    fingerprint_splits,
    make_split,
    read_manifest,
    verify_shards,
    write_manifest,
    write_shard,
)


def example(index: int, size: int = 50) -> bytes:
    return encode_example(Example(f"folder/{index}.png", bytes([index % 256]) * size, "png", 4, 5, 8))


def write_set(folder, counts):
    folder.mkdir(parents=True)
    shards, start = [], 0
    for number, count in enumerate(counts):
        shards.append(
            write_shard(folder / f"images-{number:05d}.array_record", map(example, range(start, start + count)))
        )
        start += count
    splits = {"train": make_split(shards)}
    manifest = Manifest(splits, {}, {"5x4": start}, {"8": start}, 0.5, 0.1, 3.0, fingerprint_splits(splits))
    write_manifest(folder, manifest)
    return manifest


def test_manifest_round_trip(tmp_path):
    manifest = write_set(tmp_path / "set", [3, 2])
    assert read_manifest(tmp_path / "set") == manifest
    verify_shards(tmp_path / "set")


def test_same_records_give_same_bytes(tmp_path):
    assert write_set(tmp_path / "a", [3, 2]) == write_set(tmp_path / "b", [3, 2])


def test_source_reads_all_sets_in_order_and_survives_pickle(tmp_path):
    write_set(tmp_path / "a", [3, 2])
    write_set(tmp_path / "b", [4])
    source = ShardReader([tmp_path / "a", tmp_path / "b"])
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
    source = ShardReader(tmp_path / "a")
    with pytest.raises(CorruptExample, match="record 2 of .*images-00000"):
        source[2]
    assert [source[i] for i in (0, 1, 3, 4)] == [example(i) for i in (0, 1, 3, 4)]
    with pytest.raises(InputError, match="images-00000.array_record differs"):
        verify_shards(tmp_path / "a")


UNUSABLE = [
    None, "{", "[]", '{"version": 99}', '{"version": 2, "splits": []}', "[" * 100_000, '{"a":' * 100_000,
    '{"version": 2, "mean": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("content", UNUSABLE, ids=range(len(UNUSABLE)))
def test_unusable_manifest_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError) as error:
        ShardReader(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def _edit(folder, change):
    """Applies `change` to the manifest's JSON and makes its fingerprint right again, where that can be done."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../x.array_record", "/x.array_record", "a/b.array_record", ".array_record",
                                  "manifest.json", "x", 7, None, "a\nb.array_record", "..array_record/../x"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    write_set(tmp_path / "set", [3])
    _edit(tmp_path / "set", lambda content: content["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(InputError, match="name of a shard") as error:
        read_manifest(tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", ["3", 3.0, float("nan"), -1, True, None, 10**9, 10**30])
def test_counts_that_are_none_are_refused(tmp_path, count):
    write_set(tmp_path / "set", [3])

    def change(content):
        content["splits"]["train"]["shards"][0]["count"] = content["splits"]["train"]["count"] = count

    _edit(tmp_path / "set", change)
    with pytest.raises(InputError, match=r"count of|cannot be read"):
        read_manifest(tmp_path / "set")


@pytest.mark.parametrize("mean", [float("nan"), float("inf"), 10**400, "0.5", True])
def test_statistics_that_are_no_finite_numbers_are_refused(tmp_path, mean):
    write_set(tmp_path / "set", [3])
    _edit(tmp_path / "set", lambda content: content.update(mean=mean))
    with pytest.raises(InputError, match="is not usable|cannot be read"):
        read_manifest(tmp_path / "set")


def test_a_fingerprint_of_other_shards_is_refused(tmp_path):
    write_set(tmp_path / "set", [3])
    _edit(tmp_path / "set", lambda content: content.update(fingerprint="../../etc"))
    with pytest.raises(InputError, match="fingerprint of other shards"):
        read_manifest(tmp_path / "set")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_is_one_line_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    manifest = write_set(folder, [2, 1])

    def change(content):
        place = content
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            if isinstance(place, dict) and data.draw(st.booleans()):
                del place[key]
            else:
                place[key] = data.draw(json_values)
            return

    _edit(folder, change)
    try:
        got = read_manifest(folder)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert got.splits == manifest.splits  # statistics, names or settings


def test_splits_are_read_by_name(tmp_path):
    tmp_path = tmp_path / "set"
    tmp_path.mkdir()
    splits = {
        name: make_split([write_shard(tmp_path / f"{name}.array_record", map(example, numbers))])
        for name, numbers in (("train", range(3)), ("val", range(3, 5)))
    }
    classes = {"objects": ("person", "car")}
    manifest = Manifest(splits, classes, {}, {}, 0.5, 0.1, 3.0, fingerprint_splits(splits))
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest and manifest.count == 5
    assert list(ShardReader(tmp_path, "val")) == [example(3), example(4)]
    with pytest.raises(InputError, match=r"no split 'test': it has train, val"):
        ShardReader(tmp_path, "test")


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    write_set(tmp_path / "set", [1] * 12)
    monkeypatch.setattr(shards, "_MOST_OPEN", 3)
    reader = ShardReader(tmp_path / "set")
    before = len(os.listdir("/proc/self/fd"))
    assert list(reader) == [example(i) for i in range(12)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_lack_of_file_descriptors_is_named_and_no_damage(tmp_path):
    write_set(tmp_path / "set", [2, 2])
    reader = ShardReader(tmp_path / "set")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
        taken = []
        with pytest.raises(OSError):
            while True:
                taken.append(open(os.devnull))
        with pytest.raises(InputError, match="Too many open files.*ulimit") as error:
            reader[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in taken:
            file.close()
    assert "\n" not in str(error.value) and reader[0] == example(0)


class EmptyReader:
    """What ArrayRecord gives for a file that it cannot open."""

    def num_records(self):
        return 0


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a,b [0:1] {c} *"
    write_set(folder, [2, 1])
    assert list(ShardReader(folder)) == [example(i) for i in range(3)]


def test_a_shard_that_became_unreadable_is_named_and_no_damage(tmp_path, monkeypatch):
    write_set(tmp_path / "set", [2])
    reader = ShardReader(tmp_path / "set")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "set" / "images-00000.array_record").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="No such file"):
        reader[0]
    (tmp_path / "elsewhere").rename(tmp_path / "set" / "images-00000.array_record")
    monkeypatch.setattr(shards, "describe_shard", refuse)
    monkeypatch.setattr(shards.array_record_module, "ArrayRecordReader", lambda *args, **options: EmptyReader())
    with pytest.raises(InputError, match="Permission denied"):
        ShardReader(tmp_path / "set")[0]


def test_missing_shard_is_named(tmp_path):
    write_set(tmp_path / "a", [2, 2])
    (tmp_path / "a" / "images-00001.array_record").unlink()
    with pytest.raises(InputError, match="images-00001"):
        ShardReader(tmp_path / "a")
