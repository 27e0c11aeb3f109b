"""Kill -9 at random moments, and damaged files by the hundred: real processes, the result is the same."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.examples import decode_example, decode_pixels
from data_pipelines.prepare import PrepareConfig, prepare
from data_pipelines.prepare.collect import examine_part
from data_pipelines.shards import ShardReader
from data_pipelines.workers import run_all
from tests.data_pipelines.damaged import REFUSALS, SEEDS
from tests.data_pipelines.test_prepare import REPOSITORY, read_rejected, scene, shard_bytes, write_images


def start_prepare(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_runs_continue_to_identical_shards(tmp_path):
    """The output lies inside the input, which must make no difference."""
    write_images(tmp_path / "in", 800)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    config = PrepareConfig(shard_bytes=100_000)
    prepare([tmp_path / "in"], tmp_path / "whole", config, workers=0)
    output = tmp_path / "in" / "killed"
    for parts in (1, 3):
        process = start_prepare(
            f"--input={tmp_path / 'in'}", "--workers=2", "--shard_bytes=100000", f"--output={output}"
        )
        deadline = time.monotonic() + 120
        while len(list(output.with_name("killed.partial").glob("parts/part-*.json"))) < parts:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    prepare([tmp_path / "in"], output, config, workers=0)
    assert shard_bytes(output) == shard_bytes(tmp_path / "whole") != {}
    for name in ("manifest.json", "rejected.csv"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole"]
    assert not output.with_name("killed.partial").exists()


def test_finished_parts_are_not_done_again(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 300)
    calls = []

    def interrupted(folder, number, *options):
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return examine_part(folder, number, *options)

    monkeypatch.setattr("data_pipelines.prepare.run.examine_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    prepare([tmp_path / "in"], tmp_path / "out", workers=0)
    assert calls == [0, 1, 1]


def test_second_run_into_the_same_output_is_refused(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 3)

    def meanwhile(*arguments):
        with pytest.raises(InputError, match="another run"):
            prepare([tmp_path / "in"], tmp_path / "out", workers=0)
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipelines.prepare.run.examine_part", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "in"], tmp_path / "out", workers=0)


def test_dead_worker_is_reported_in_one_line():
    with pytest.raises(InputError, match="worker process died"):
        list(run_all(2, os._exit, [(1,)] * 4))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, time\n"
        "from data_pipelines.workers import run_all\n"
        "def work():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(run_all(2, work, [()] * 2))\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, env=environment)
    workers = {int(process.stdout.readline()) for _ in range(2)}
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


def damaged(rng) -> bytes:
    """A real file cut, with flipped bits or with a block overwritten; or random bytes behind a signature."""
    data = bytearray(SEEDS[rng.integers(len(SEEDS))])
    start, kind = int(rng.integers(len(data))), rng.integers(4)
    if kind == 0:
        return bytes(data[:start])
    if kind == 1:
        return bytes(data[:4]) + rng.bytes(400)
    if kind == 2:
        data[start : start + 20] = rng.bytes(20)
        return bytes(data)
    for place in rng.integers(len(data), size=rng.integers(1, 20)):
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def test_a_hundred_damaged_files_are_kept_or_rejected(tmp_path):
    folder, rng = tmp_path, np.random.default_rng(5)
    files = [damaged(rng) for _ in range(100)]
    (folder / "in").mkdir()
    for index, content in enumerate(files):
        (folder / "in" / f"{index:03d}.jpg").write_bytes(content)
    Image.fromarray(scene(0)).save(folder / "in" / "good.png")
    manifest = prepare([folder / "in"], folder / "out", workers=0)
    assert manifest.count + sum(manifest.settings["rejected"].values()) == 101
    rows = {row["path"]: row["reason"] for row in read_rejected(folder / "out")}
    assert len(rows) == 101 - manifest.count
    known = {*REFUSALS, "too_small", "constant", "too_few_levels", "exact_duplicate", "near_duplicate"}
    assert set(rows.values()) <= known
    for stored in ShardReader(folder / "out"):
        assert decode_pixels(decode_example(stored)).dtype in (np.uint8, np.uint16)
