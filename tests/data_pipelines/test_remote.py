"""Sets behind URLs, on fsspec's store in memory: copied once, checked, never half there."""

import json
import os

import fsspec
import numpy as np
import pytest

from data_pipelines import remote
from data_pipelines.errors import InputError
from data_pipelines.pipeline import PipelineConfig, num_examples, record_keys, train_batches
from data_pipelines.remote import local_folders
from tests.data_pipelines.shard_sets import make_set


@pytest.fixture
def store(tmp_path, monkeypatch):
    """URL of a set in memory, its local original, and the cache."""
    monkeypatch.setenv("INFMAE_CACHE", str(tmp_path / "cache"))
    remote._copy_of.cache_clear()
    folder = make_set(tmp_path / "set", 10)
    memory = fsspec.filesystem("memory")
    memory.put(folder, "/bucket/set", recursive=True)
    yield "memory://bucket/set", folder, tmp_path / "cache"
    memory.rm("/bucket", recursive=True)


def test_batches_of_a_url_equal_those_of_the_folder(store):
    url, folder, _ = store
    local, far = (PipelineConfig((place,), image_size=(32, 32), batch_size=4) for place in (folder, url))
    assert num_examples(far) == 10 and record_keys(far, 1) == record_keys(local, 1)
    with train_batches(local) as near, train_batches(far) as copied:
        for _ in range(3):
            np.testing.assert_array_equal(next(near)["image"], next(copied)["image"])


def test_a_set_is_copied_once_and_again_when_it_changes(store, tmp_path):
    url, _, cache = store
    (first,) = local_folders([url])
    before = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*")}
    remote._copy_of.cache_clear()
    assert local_folders([url]) == (first,)
    assert {path.name: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket/set", recursive=True)
    memory.put(make_set(tmp_path / "other", 6), "/bucket/set", recursive=True)
    remote._copy_of.cache_clear()
    (second,) = local_folders([url])
    assert second != first and num_examples(PipelineConfig((second,))) == 6


def test_damage_on_the_way_is_refused_and_leaves_nothing(store):
    url, _, cache = store
    with fsspec.filesystem("memory").open("/bucket/set/train-0.array_record", "r+b") as file:
        file.write(b"damage")
    with pytest.raises(InputError, match=r"train-0\.array_record differs"):
        local_folders([url])
    assert os.listdir(cache) == []


@pytest.mark.parametrize("url", ["memory://bucket/nowhere", "unheard-of://bucket/set"])
def test_urls_that_cannot_be_read_are_named(store, url):
    with pytest.raises(InputError, match=url.split(":")[0]) as caught:
        local_folders([url])
    assert "\n" not in str(caught.value) and os.listdir(store[2]) == []


@pytest.mark.parametrize("folder", ["../..", "absolute"])
def test_nothing_is_written_outside_of_the_cache(store, tmp_path, folder):
    url, _, cache = store
    name = f"{tmp_path if folder == 'absolute' else folder}/escaped.array_record"
    memory = fsspec.filesystem("memory")
    content = json.loads(memory.cat("/bucket/set/manifest.json"))
    content["splits"]["train"]["shards"][0]["name"] = name
    memory.pipe("/bucket/set/manifest.json", json.dumps(content).encode())
    memory.pipe("/bucket/escaped.array_record", b"x")
    with pytest.raises(InputError, match="name of a shard"):
        local_folders([url])
    assert os.listdir(cache) == [] and not list(tmp_path.glob("**/escaped*"))
    assert not list(cache.parent.parent.glob("**/escaped*"))


def test_paths_stay_as_they_are(tmp_path):
    assert local_folders([str(tmp_path)]) == (str(tmp_path),)
