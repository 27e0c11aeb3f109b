"""The cache of decoded images: never another pixel, whoever is killed, whatever a crash leaves of its files."""

import dataclasses
import functools
import operator
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import decode, examples, image_cache
from data_pipelines.augment import Box
from data_pipelines.errors import InputError
from data_pipelines.examples import Intensity
from data_pipelines.pipeline import PipelineConfig, train_batches
from tests.data_pipelines.batch_digests import sample_digests
from tests.data_pipelines.fill_cache import SHAPE, image, open_cache
from tests.data_pipelines.shard_sets import make_image, make_record, make_set, write_set

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 20
WHOLE = Box(0, 0, *SHAPE)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Sets with JPEG, PNG and 16-bit records of several sizes; two of the first set's are damaged."""
    folder = tmp_path_factory.mktemp("data")
    wide = [make_record(f"wide{i}", make_image(i, 70, 90).astype(np.uint16) * 200, "png") for i in range(3)]
    return make_set(folder / "set", COUNT, damaged=(6, 8)), write_set(folder / "wide", wide, shards=1)


def _config(shards, **changes):
    defaults = {"shards": shards, "batch_size": 8, "image_size": (32, 48), "seed": 3, "threads": 0}
    return PipelineConfig(**(defaults | changes))


def _digests(config, steps=8, process=0, processes=1):
    """Steps of 8 samples among 23 records: epochs 1, 2 and a part of 3."""
    with train_batches(config, 0, process, processes) as batches:
        got = [sample_digests(next(batches)) for _ in range(steps)]
        return got, batches.substituted


@pytest.mark.parametrize("changes", [{}, {"threads": 3}, {"workers": 2}, {"weights": (1.0, 2.0)}])
def test_the_cache_changes_nothing(shards, tmp_path, changes):
    plain = _config(shards, **{key: value for key, value in changes.items() if key == "weights"})
    expected = _digests(plain)
    cached = _config(shards, cache=str(tmp_path / "cache"), **changes)
    assert _digests(cached) == expected
    assert _digests(dataclasses.replace(cached, workers=0)) == expected  # from what is in the cache now


def test_hosts_with_caches_of_their_own_share_the_batch(shards, tmp_path):
    hosts = [_digests(_config(shards, cache=str(tmp_path / str(k))), 8, k, 2)[0] for k in range(2)]
    joined = [functools.reduce(operator.iadd, step, []) for step in zip(*hosts, strict=True)]
    assert joined == _digests(_config(shards))[0]


def test_a_full_cache_spares_decoding(tmp_path, monkeypatch):
    config = _config((make_set(tmp_path / "set", 8),), cache=str(tmp_path / "cache"))
    expected = _digests(config, 4)
    decoded = []
    original = decode.decode_record_pixels
    monkeypatch.setattr(examples, "decode_record_pixels", lambda r: decoded.append(r.key) or original(r))
    assert _digests(config, 4) == expected and decoded == []
    # Another mapping has pixels of its own; the same set joined with others has them already.
    _digests(dataclasses.replace(config, intensity=Intensity("min_max")), 1)
    assert len(decoded) == 8
    other = make_set(tmp_path / "other", 4, name="other")
    _digests(dataclasses.replace(config, shards=(other, *config.shards)), 2)
    assert all(key.startswith("other") for key in decoded[8:]) and len(decoded) == 12


def test_only_the_rows_of_the_box_are_read(tmp_path, monkeypatch):
    cache = open_cache(tmp_path, 2)
    cache.store(1, image(1))
    read = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read.append(len(views[0])) or original(file, views, at))
    box = Box(100, 33, 50, 70)
    found = cache.find(1)
    np.testing.assert_array_equal(found.read(box), box.of(image(1)))
    assert (found.height, found.width) == SHAPE and read == [50 * SHAPE[1]]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache)).find(1).read(box), box.of(image(1)))


def _check(cache, count):
    """Every image that is found is the right one; returns how many are."""
    found = {number: cache.find(number) for number in range(count)}
    for number, kept in found.items():
        if kept is not None:
            np.testing.assert_array_equal(kept.read(WHOLE), image(number))
    return sum(kept is not None for kept in found.values())


def test_killed_processes_leave_whole_images_only(tmp_path):
    count = 400
    command = [sys.executable, "-m", "tests.data_pipelines.fill_cache", str(tmp_path), str(count)]
    moments, found = random.Random(3), []
    for _ in range(3):
        # Two at once, whose images overlap, each other's rivals for every place.
        running = [
            subprocess.Popen([*command, first, step], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
            for first, step in (("0", "1"), ("1", "2"))
        ]
        for process in running:
            assert process.stdout.readline() == "filling\n"
        time.sleep(moments.uniform(0.001, 0.03))
        for process in running:
            process.kill()
            process.communicate()
        found.append(_check(open_cache(tmp_path, count), count))
    assert found == sorted(found) and 0 < found[0]
    subprocess.run([*command, "0", "1"], check=True, capture_output=True, cwd=REPOSITORY)
    assert _check(open_cache(tmp_path, count), count) == count


def test_threads_store_without_overwriting_each_other(tmp_path):
    cache = open_cache(tmp_path, 60)
    threads = [
        threading.Thread(target=lambda k=k: [cache.store(n, image(n)) for n in range(k, 60, 3)]) for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _check(cache, 60) == 60


def _boot(monkeypatch, tmp_path, number):
    (tmp_path / "boot").write_text(f"00000000-0000-0000-0000-{number:012d}\n")
    monkeypatch.setattr(image_cache, "_BOOT_ID", tmp_path / "boot")


@hypothesis.given(
    lost=st.lists(st.tuples(st.sampled_from(["pixels", "index"]), st.integers(0, 10**6), st.booleans()), max_size=6),
    cut=st.integers(0, 2 * 10**6),
    old_header=st.booleans(),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_crash_of_the_machine_loses_images_but_changes_none(lost, cut, old_header, tmp_path_factory):
    """Pages and sectors that never reached the disk read as zeros, or as they were before."""
    folder = tmp_path_factory.mktemp("crash")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _boot(monkeypatch, folder, 1)
        cache = open_cache(folder / "cache", 20)
        index = next((folder / "cache").glob("*/index"))
        earlier = index.read_bytes()
        for number in range(15):
            cache.store(number, image(number))
        for name, place, old in lost:
            path = index.with_name(name)
            content = bytearray(path.read_bytes())
            size = 4096 if name == "pixels" else 16
            start = max(64, place % len(content) // size * size)  # the header is one sector: whole, old or new
            content[start : start + size] = earlier[start : start + size] if old and name == "index" else bytes(size)
            path.write_bytes(content[: len(earlier)] if name == "index" else content)
        if old_header:
            index.write_bytes(earlier[:64] + index.read_bytes()[64:])
        pixels = index.with_name("pixels")
        os.truncate(pixels, min(cut, pixels.stat().st_size))
        _boot(monkeypatch, folder, 2)
        cache = open_cache(folder / "cache", 20)
        assert _check(cache, 20) <= 15
        for number in range(20):
            if cache.find(number) is None:
                cache.store(number, image(number))
        assert _check(cache, 20) == 20
    shutil.rmtree(folder)


def test_a_disk_that_is_too_small_is_named_beforehand(shards, tmp_path, monkeypatch):
    config = _config(shards, cache=str(tmp_path / "cache"))
    room = SimpleNamespace(free=3 * 70 * 90 + COUNT * 60 * 80 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(InputError, match=r"data\.cache=.*needs .* GB more .*another disk") as caught:
        train_batches(config)
    assert "\n" not in str(caught.value)
    room.free += 1
    _digests(config)
    room.free = 2 * 60 * 80  # the damaged records are never decoded; all others are there
    _digests(config)


def test_a_disk_that_fills_up_only_ends_the_keeping(shards, tmp_path, monkeypatch, caplog):
    original, written = image_cache._write, []

    def write(file, content, start):
        written.append(len(content))
        if sum(written) > 40_000:
            raise OSError(28, "No space left on device")
        original(file, content, start)

    monkeypatch.setattr(image_cache, "_write", write)
    expected = _digests(_config(shards))
    assert _digests(_config(shards, cache=str(tmp_path))) == expected
    assert sum("no more images are kept" in message for message in caplog.messages) == 2  # one a shard set
    monkeypatch.undo()
    assert _digests(_config(shards, cache=str(tmp_path))) == expected


def test_unusable_folders_are_named(shards, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data\.cache=.*file cannot be used"):
        train_batches(_config(shards, cache=str(tmp_path / "file")))
    cache = _config(shards, cache=str(tmp_path / "cache"))
    _digests(cache)
    for index in (tmp_path / "cache").glob("*/index"):
        index.write_bytes(b"something else" + index.read_bytes()[14:])
    with pytest.raises(InputError, match="index is damaged; delete"):
        train_batches(cache)
