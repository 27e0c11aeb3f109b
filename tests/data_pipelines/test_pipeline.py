"""The order of samples, in this process and in real ones; damage; workers; mistakes."""

import dataclasses
import functools
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.batches import DamagedShards, WorkerDied
from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example, decode_pixels
from data_pipelines.intensity import Intensity
from data_pipelines.masking import MaskConfig, select_visible, token_scores
from data_pipelines.pipeline import (
    PipelineConfig,
    fixed_batch,
    num_examples,
    record_keys,
    train_batches,
)
from data_pipelines.shards import ShardReader
from data_pipelines.transforms import InfraredAugment, center_crop_resize, draw_crop, infrared_augment, resize
from tests.data_pipelines.batch_digests import sample_digests
from tests.data_pipelines.shard_sets import make_example, make_image, make_set, truncated, write_set

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("data") / "set", COUNT)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Records 3 and 4 of the reading order (shards hold even and odd records) are damaged: image06 and image08."""
    return make_set(tmp_path_factory.mktemp("data") / "damaged", COUNT, damaged=(6, 8))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Eight records of as many sizes, two of them damaged."""
    records = [make_example(f"image{i:02d}", make_image(i, 50 + 5 * i, 120 - 6 * i)) for i in range(8)]
    records = [truncated(record) if i in (2, 5) else record for i, record in enumerate(records)]
    return write_set(tmp_path_factory.mktemp("data") / "sizes", records)


def _config(*shards, **changes):
    defaults = {"shards": shards, "batch_size": 8, "image_size": (32, 48), "seed": 3, "threads": 0}
    return PipelineConfig(**(defaults | changes))


def _take(config, steps, start=0, process=0, processes=1):
    with train_batches(config, start, process, processes) as batches:
        return [next(batches) for _ in range(steps)]


def _digests_of_processes(*runs):
    """Runs `batch_digests` once a run, all at the same time; returns each one's digests a step."""
    command = [sys.executable, "-m", "tests.data_pipelines.batch_digests"]
    started = [
        subprocess.Popen([*command, *map(str, run)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for run in runs
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(runs)
    return [[line.split()[1:] for line in output.splitlines()] for output in outputs]


def test_batches_have_the_documented_shapes(shards):
    for batch in _take(_config(shards), 2):
        assert set(batch) == {"image", "ids_keep"}
        assert batch["image"].shape == (8, 32, 48, 1) and batch["image"].dtype == np.uint8
        assert batch["ids_keep"].shape == (8, 2) and batch["ids_keep"].dtype == np.int32


@pytest.mark.parametrize("name", ["shards", "sizes"])
def test_a_sample_is_the_composition_of_its_steps(name, request):
    """Sample g of the run, made by hand from its record (or what stands in for it) and the generator of (seed, g)."""
    shards = request.getfixturevalue(name)
    augment = InfraredAugment(gain=0.2, offset=10, invert=0.5, column_noise=3, blur=1)
    config = _config(shards, augment=augment, mask=MaskConfig(score="entropy"))
    records = {record.key: record for record in map(decode_example, ShardReader(shards))}
    for step, batch in enumerate(_take(config, 4)):
        for place, key in enumerate(record_keys(config, step)):
            rng = np.random.default_rng([config.seed, step * 8 + place])
            image = decode_pixels(records[key])
            crop = resize(draw_crop(rng, *image.shape).of(image), (32, 48))
            crop = infrared_augment(crop[:, ::-1] if rng.random() < 0.5 else crop, rng, augment)
            np.testing.assert_array_equal(batch["image"][place, ..., 0], crop)
            scores = token_scores(crop, config.mask)
            np.testing.assert_array_equal(batch["ids_keep"][place], select_visible(scores, config.mask))


def test_every_epoch_is_a_permutation_of_its_own(shards):
    config = _config(shards, batch_size=5)
    epochs = [[key for step in range(4 * e, 4 * e + 4) for key in record_keys(config, step)] for e in range(3)]
    everything = sorted(f"image{i:02d}" for i in range(COUNT))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert record_keys(dataclasses.replace(config, seed=4), 0) != record_keys(config, 0)


def test_the_same_record_is_cropped_anew_in_every_epoch(shards):
    first, second = [], []
    for step, batch in enumerate(_take(_config(shards, batch_size=10), 4)):
        keys = record_keys(_config(shards, batch_size=10), step)
        (first if step < 2 else second).extend(zip(keys, sample_digests(batch), strict=True))
    assert all(dict(first)[key] != digest for key, digest in second)


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_resuming_at_a_step_gives_the_batches_from_there(shards, start):
    config = _config(shards)
    whole = [sample_digests(batch) for batch in _take(config, 9)]
    assert [sample_digests(batch) for batch in _take(config, 9 - start, start)] == whole[start:]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch_in_order(shards, hosts):
    config = _config(shards)
    alone = [sample_digests(batch) for batch in _take(config, 6, start=1)]
    parts = [[sample_digests(batch) for batch in _take(config, 6, 1, host, hosts)] for host in range(hosts)]
    assert [functools.reduce(operator.iadd, step, []) for step in zip(*parts, strict=True)] == alone


def test_processes_workers_and_hosts_agree_in_two_epochs(shards):
    """20 records, batches of 8: steps 0 to 4 are epochs 1 and 2."""
    first, second = _digests_of_processes((shards, 8, 0, 5, 0, 2, 0, 1), (shards, 8, 0, 5, 1, 2, 2, 1))
    mask = MaskConfig(score="none", selection="random")
    config = PipelineConfig(shards=(str(shards),), batch_size=8, seed=3, mask=mask, threads=2)
    alone = [sample_digests(batch) for batch in _take(config, 5)]
    assert [functools.reduce(operator.iadd, step, []) for step in zip(first, second, strict=True)] == alone


def test_sets_are_mixed_by_weight(tmp_path, shards):
    other = make_set(tmp_path / "other", 6, name="other")
    config = _config(shards, other, weights=(3.0, 1.0), batch_size=40)
    keys = record_keys(config, 0) + record_keys(config, 1)
    assert Counter(key.startswith("other") for key in keys) == {False: 60, True: 20}
    # Each set runs through all its records before it repeats one.
    images = [key for key in keys if key.startswith("image")]
    assert all(len(set(images[e * COUNT : (e + 1) * COUNT])) == COUNT for e in range(3))
    assert num_examples(config) == COUNT + 6
    hosts = [_take(config, 1, 1, host, 2)[0] for host in range(2)]
    assert functools.reduce(operator.iadd, map(sample_digests, hosts), []) == sample_digests(_take(config, 2)[1])


def test_sets_without_weights_are_joined(tmp_path, shards):
    other = make_set(tmp_path / "other", 5, name="other")
    keys = record_keys(_config(shards, other, batch_size=25), 0)
    assert len(set(keys)) == 25 and sum(key.startswith("other") for key in keys) == 5


def test_fixed_batch_is_the_plain_view(shards):
    config = _config(shards, image_size=(32, 32), mask=MaskConfig(score="none", selection="random", keep=2))
    batch = fixed_batch(config, 3)
    source = [decode_pixels(decode_example(data)) for data in ShardReader(shards)]
    for place, index in enumerate((0, 9, 19)):
        np.testing.assert_array_equal(batch["image"][place, ..., 0], center_crop_resize(source[index], (32, 32)))
    assert batch["ids_keep"].shape == (3, 2)
    np.testing.assert_array_equal(fixed_batch(config, 3)["ids_keep"], batch["ids_keep"])


def test_intensity_mapping_is_applied_in_source_units(tmp_path):
    kelvin = np.linspace(27000, 31000, 60 * 80).reshape(60, 80).astype(np.uint16)
    record = dataclasses.replace(make_example("frame", kelvin, "png"), attributes={"unit": "kelvin", "scale": 0.01})
    shards = write_set(tmp_path / "set", [record], shards=1)
    config = _config(shards, intensity=Intensity("fixed", 270.0, 310.0), image_size=(32, 32))
    expected = np.rint((kelvin * 0.01 - 270) * 255 / 40).astype(np.uint8)
    np.testing.assert_array_equal(fixed_batch(config, 1)["image"][0, ..., 0], center_crop_resize(expected, (32, 32)))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_records_are_replaced_by_the_next_good_one_and_counted(damaged, workers):
    config = _config(damaged, workers=workers)
    with train_batches(config) as batches:
        got = [next(batches) for _ in range(5)]
        keys = [key for step in range(5) for key in record_keys(config, step)]
        # Both damaged records, twice each in two epochs, stand behind the same one: image10.
        assert Counter(keys) == Counter({f"image{i:02d}": 2 for i in range(COUNT) if i not in (6, 8)} | {"image10": 6})
        assert (batches.samples, batches.damaged) == (40, 4)
    whole = dataclasses.replace(config, workers=0)
    assert [sample_digests(batch) for batch in got] == [sample_digests(batch) for batch in _take(whole, 5)]


def test_too_many_damaged_records_stop_the_run_and_name_one(damaged):
    message = r"4 of \d+ samples.*max_corrupt=0.003.*record \d+: image0[68]"
    with (
        train_batches(_config(damaged, max_corrupt=0.003)) as batches,
        pytest.raises(DamagedShards, match=message) as caught,
    ):
        for _ in range(10):
            next(batches)
    assert "\n" not in str(caught.value)
    with train_batches(_config(damaged, max_corrupt=0.0)) as batches, pytest.raises(DamagedShards, match=r"[12] of 8"):
        for _ in range(3):
            next(batches)


def test_a_set_of_damage_alone_ends_at_once(tmp_path):
    shards = make_set(tmp_path / "set", 4, damaged=range(4))
    with train_batches(_config(shards)) as batches, pytest.raises(DamagedShards, match="the 3 after it"):
        next(batches)


def test_damage_on_disk_is_replaced_too(tmp_path):
    shards = make_set(tmp_path / "set", 6)
    path = Path(shards) / "train-0.array_record"
    content = bytearray(path.read_bytes())
    payload = decode_example(ShardReader(shards)[1]).image
    content[content.find(payload) + len(payload) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with train_batches(_config(shards)) as batches:
        for _ in range(3):
            next(batches)
        assert batches.damaged == 4


def test_a_killed_worker_is_reported(shards):
    with train_batches(_config(shards, workers=2)) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerDied, match="lower data") as caught:
            for _ in range(200):
                next(batches)
        assert time.monotonic() - start < 30
        assert caught.value.exit_code == EXIT_LOST


READS_UNTIL_KILLED = """
import multiprocessing, sys
from data_pipelines.pipeline import PipelineConfig, train_batches
if __name__ == "__main__":
    batches = train_batches(PipelineConfig(shards=(sys.argv[1],), batch_size=8, workers=2, image_size=(64, 64)))
    for _ in range(2):  # one of each worker: both have started
        next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    for _ in range(40):
        next(batches)
    print("still reading", flush=True)
    sys.stdin.readline()
"""


def test_workers_leave_signals_to_their_parent_and_die_with_it(shards, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(READS_UNTIL_KILLED)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, script, shards], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        # What a scheduler sends to all processes of a job, and a terminal to all of its foreground.
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still reading\n"
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_outlive_their_iterator_and_closing_twice_is_harmless(shards, workers):
    with train_batches(_config(shards, workers=workers)) as batches:
        batch = next(batches)
        digests = sample_digests(batch)
    batches.close()
    assert sample_digests(batch) == digests
    with pytest.raises(ValueError, match="closed"):
        next(batches)


LEAVES_ITERATORS_OPEN = """
import sys
from data_pipelines.pipeline import PipelineConfig, train_batches
if __name__ == "__main__":
    for workers in (0, 2):
        batches = train_batches(PipelineConfig(shards=(sys.argv[1],), batch_size=8, workers=workers))
        batch = next(batches)
    print("done")
"""


def test_a_program_that_does_not_close_ends_cleanly(shards, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(LEAVES_ITERATORS_OPEN)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, script, shards], check=False, capture_output=True, text=True, env=environment, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"image_size": (30, 32)}, "30x32"),
        ({"weights": (1.0, 2.0)}, "weights"),
        ({"weights": (-1.0,)}, "weights"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 2**32}, "seed"),
        ({"threads": -1}, "threads"),
        ({"max_corrupt": 1.5}, "max_corrupt"),
        ({"batch_size": 2**40}, "batch_size"),
        ({"prefetch": 0}, "prefetch"),
        ({"ratio": (1.0, float("inf"))}, "ratio"),
        ({"max_corrupt": float("nan")}, "max_corrupt"),
        ({"mask": MaskConfig(stride=1)}, "6 of 6"),
    ],
)
def test_unusable_configs_are_named(changes, named):
    with pytest.raises(InputError, match=named) as caught:
        _config("anywhere", **changes)
    assert "\n" not in str(caught.value)


def test_unusable_shards_and_hosts_are_named(shards, tmp_path):
    with pytest.raises(InputError, match="shards is empty"):
        train_batches(_config())
    with pytest.raises(InputError, match="missing-set"):
        num_examples(_config(str(tmp_path / "missing-set")))
    with pytest.raises(InputError, match="3 hosts"):
        train_batches(_config(shards), 0, 0, 3)
    with pytest.raises(InputError, match="mapping"):
        Intensity("histogram")
    with pytest.raises(InputError, match="no records"):
        num_examples(_config(write_set(tmp_path / "empty", [], shards=1)))


def test_images_of_the_helper_have_detail():
    """A constant test image would make equal digests meaningless."""
    assert np.std(make_image(0)) > 10
