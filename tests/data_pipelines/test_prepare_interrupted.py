"""Kill -9 at random moments, and damaged files by the hundred: real processes, the result is the same."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.decode import REFUSALS
from data_pipelines.errors import InputError
from data_pipelines.prepare import prepare
from data_pipelines.prepare.collect import examine_part
from data_pipelines.examples import decode_example, decode_pixels
from data_pipelines.shards import ShardReader
from data_pipelines.workers import worker_pool
from tests.data_pipelines.damaged import damaged_files
from tests.data_pipelines.test_prepare import REPOSITORY, read_rejected, scene, shard_bytes, write_images


def start_prepare(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_runs_continue_to_identical_shards(tmp_path):
    write_images(tmp_path / "in", 800)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    common = [f"--input={tmp_path / 'in'}", "--workers=2", "--shard_bytes=100000"]
    started = time.monotonic()
    assert start_prepare(*common, f"--output={tmp_path / 'whole'}").wait(300) == 0
    duration = time.monotonic() - started

    moments = random.Random(5)
    for _ in range(5):
        process = start_prepare(*common, f"--output={tmp_path / 'killed'}")
        time.sleep(moments.uniform(0.1, duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        # A finished output appears whole or not at all.
        assert not (tmp_path / "killed").exists() or (tmp_path / "killed" / "manifest.json").exists()
    assert start_prepare(*common, f"--output={tmp_path / 'killed'}").wait(300) == 0
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole") != {}
    for name in ("manifest.json", "rejected.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "killed", "whole"]


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
        prepare([tmp_path / "in"], tmp_path / "out", workers=0, progress=False)
    prepare([tmp_path / "in"], tmp_path / "out", workers=0, progress=False)
    assert calls == [0, 1, 1]


def test_second_run_into_the_same_output_is_refused(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 3)

    def meanwhile(*arguments):
        with pytest.raises(InputError, match="another run"):
            prepare([tmp_path / "in"], tmp_path / "out", workers=0, progress=False)
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipelines.prepare.run.examine_part", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "in"], tmp_path / "out", workers=0, progress=False)


def test_dead_worker_is_reported_in_one_line():
    with worker_pool(2, 4) as run_all, pytest.raises(InputError, match="worker process died"):
        list(run_all(os._exit, [(1,)] * 4))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, time\n"
        "from data_pipelines.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(2, 4) as run_all:\n"
        "        for pid in run_all(os.getpid, [()] * 2):\n"
        "            print(pid, flush=True)\n"
        "        list(run_all(time.sleep, [(60,)] * 2))\n"
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


@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(damaged_files(), min_size=100, max_size=100))
def test_a_hundred_damaged_files_are_kept_or_rejected(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "in").mkdir()
    for index, content in enumerate(files):
        (folder / "in" / f"{index:03d}.jpg").write_bytes(content)
    Image.fromarray(scene(0)).save(folder / "in" / "good.png")
    report = prepare([folder / "in"], folder / "out", workers=0, progress=False)
    assert report.found == 101 == report.kept + sum(report.rejected.values())
    rows = {row["path"]: row["reason"] for row in read_rejected(folder / "out")}
    assert len(rows) == 101 - report.kept
    known = {*REFUSALS, "too_small", "constant", "too_few_levels", "exact_duplicate", "near_duplicate"}
    assert set(rows.values()) <= known
    for stored in ShardReader(folder / "out"):
        assert decode_pixels(decode_example(stored)).dtype in (np.uint8, np.uint16)
