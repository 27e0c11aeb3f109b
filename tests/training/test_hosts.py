"""The same losses on one process and on several, on any mesh, and after moving from one topology to another.

With --long of the hybrid encoder, also on four processes, on data-parallel and fsdp meshes, and with more moves:

    launch/test.sh tests/training/test_hosts.py --long
"""

import collections
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from infmae_jax import pretrain
from infmae_jax.training.writers import read_events
from tests import commands
from tests.training import host_process
from tests.training.jobs import PRETRAIN, ROOT, SMALLEST, SMOKE, Job, beginnings, checkpoints, free_port, rows_of

STEPS = 20
MESHES = {"data": {"data": -1}, "fsdp": {"data": 1, "fsdp": -1}, "mixed": {"data": -1, "fsdp": 2}}


def train(shards, runs, processes, devices, port=None):
    """Trains `runs` in a job of real processes with so many virtual devices each; one process may be this one."""
    if processes == 1 and devices == jax.device_count():
        return host_process.main(str(shards), runs, {})
    port = port or free_port()
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    started = []
    for index in range(processes):
        method = {
            "method": "addresses", "coordinator": f"127.0.0.1:{port}", "num_processes": processes, "process_id": index,
        }  # fmt: skip
        task = {"shards": str(shards), "runs": runs, "distributed": method if processes > 1 else {}}
        command = [sys.executable, "-m", "tests.training.host_process", json.dumps(task)]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        for process in started:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()


STRANGERS = (
    b"", bytes(1000), b"GET / HTTP/1.1\r\n\r\n", b'["end", 0, "finished"]\n',
    b"0" * 32 + b"\n" + b"1" * 64 + b' ["hello", 1, "[]"]\n',
    b'{"kind": "hello", "index": 1, "host": "h", "pid": 1, "facts": {}}\n',
)  # fmt: skip


@contextlib.contextmanager
def strangers(job):
    """Connect to the coordinator's port and the one below, again and again, from before the job listens to its end.

    Yields:
      what they were told, by what they said.
    """
    heard, over = collections.defaultdict(list), threading.Event()

    def visit(port, said):
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(said)
                connection.settimeout(0.5)
                heard[port, said].append(connection.recv(1 << 16))
            over.wait(0.2)

    threads = [threading.Thread(target=visit, args=(port, said)) for port in (job, job - 1) for said in STRANGERS]
    for thread in threads:
        thread.start()
    try:
        yield heard
    finally:
        over.set()
        for thread in threads:
            thread.join()


def losses(run):
    return np.array([row["loss"] for row in rows_of(run)])


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory, pytestconfig, steps_compiled_once):
    """Folder of runs by name, all of the same losses: of a job of one process, then of one of several.

    "one", on one device; "first", half of one with sharded parameters; "on N", which goes on from there with fewer
    devices; "P MESH", of P processes with two devices each; "apart", from "first" on two processes.
    """
    long = pytestconfig.getoption("--long")
    folder, sharded = tmp_path_factory.mktemp("hosts"), {"data": 1, "fsdp": -1}
    devices, fewer = (8, (4, 2, 1)) if long else (4, (1,))

    def run(name, mesh, **more):
        kind = "hybrid" if long else "vit"
        return {"run": str(folder / name), "mesh": mesh, "steps": STEPS, "kind": kind, **more}

    def goes_on(name, mesh, **more):
        return run(name, mesh, copy=str(folder / "first"), **more)

    train(shards, [
        run("one", MESHES["data"], devices=1), run("first", sharded, until=STEPS // 2),
        *(goes_on(f"on {count}", {"data": -1, "fsdp": min(2, count)}, devices=count) for count in fewer),
    ], 1, devices)  # fmt: skip
    shutil.copytree(folder / "first", folder / "apart")
    for processes in (2, 4) if long else (2,):
        meshes, port = MESHES if long else ("mixed",), free_port()
        jobs = [run(f"{processes} {name}", MESHES[name]) for name in meshes]
        jobs += [run("apart", sharded)] if processes == 2 else []
        with strangers(port) as heard:
            train(shards, jobs, processes, 2, port)
        assert {said for _, said in heard} == set(STRANGERS)
        assert all(len(answer) in (0, 33) for (at, _), answers in heard.items() if at < port for answer in answers)
    return folder


def test_losses_on_several_processes_equal_those_of_one(runs):
    """With strangers at the ports, who learn nothing."""
    one, several = losses(runs / "one"), [*runs.glob("2 *"), *runs.glob("4 *")]
    assert len(one) == STEPS and several
    for run in several:
        np.testing.assert_allclose(losses(run), one, rtol=1e-6)


def test_a_run_moves_between_topologies(runs):
    """Saved on several devices with sharded parameters; goes on with fewer of them, and on two processes."""
    assert 0 < checkpoints(runs / "first")[-1] < STEPS
    for place in (*runs.glob("on *"), runs / "apart"):
        assert beginnings(place) == [0, checkpoints(runs / "first")[-1]]
        np.testing.assert_allclose(losses(place), losses(runs / "one"), rtol=1e-6)


def test_a_killed_host_ends_the_other_by_name_and_the_run_goes_on(shards, tmp_path, pytestconfig, monkeypatch):
    """With one process; with --long, with both hosts, until the platform takes one of them."""
    flags = (*SMALLEST, "--config.duration=3000 steps", "--config.checkpoint_every=5 steps", "--config.data.workers=1")
    with Job(tmp_path, shards, *flags, processes=2) as job:
        assert job.wait_until(lambda: checkpoints(tmp_path))
        job.processes[1].send_signal(signal.SIGKILL)
        code, _, errors = job.ended(60)[0]
        assert code == 76, errors
        assert "process 1 (" in errors and "ended without a word" in errors and "Traceback" not in errors
        job.assert_no_orphans()
    saved = checkpoints(tmp_path)[-1]
    if not pytestconfig.getoption("--long"):
        ending = functools.partialmethod(host_process.EndingEarly.__init__, until=saved + 3)
        monkeypatch.setattr(pretrain, "PretrainTask", type("Ending", (host_process.EndingEarly,), {"__init__": ending}))
        data = f"--workdir={tmp_path}", f"--config.data.shards={shards}"
        done = commands.run(*PRETRAIN, *data, *flags)
        assert done.returncode == 75 and beginnings(tmp_path)[1] == saved < checkpoints(tmp_path)[-1], done.stderr
        return
    with Job(tmp_path, shards, *flags, processes=2) as job:
        assert job.wait_until(lambda: len(beginnings(tmp_path)) == 2)
        job.processes[0].send_signal(signal.SIGTERM)  # the platform takes one host: both save and end
        for code, _, errors in job.ended(60):
            assert code == 75, errors
        job.assert_no_orphans()
    names = [event["event"] for event in read_events(tmp_path)]
    assert names[0] == "start" and "resume" in names and names[-1] == "preempted"
    assert beginnings(tmp_path)[1] >= 5


def test_a_missing_host_is_named_within_the_timeout(shards, tmp_path):
    port = free_port()
    command = [
        sys.executable, "-m", "infmae_jax.pretrain", SMOKE, f"--workdir={tmp_path / 'run'}",
        f"--config.data.shards={shards}", "--config.distributed.method=addresses",
        f"--config.distributed.coordinator=127.0.0.1:{port}", "--config.distributed.num_processes=2",
        "--config.distributed.process_id=0", "--config.distributed.timeout_seconds=2",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 76
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "process 1 of 2 did not arrive" in lines[0] and "within 2 s" in lines[0]
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_hosts_with_different_configs_are_told_apart(shards, tmp_path):
    port, processes = free_port(), []
    for index in range(2):
        command = [
            sys.executable, "-m", "infmae_jax.pretrain", SMOKE, f"--workdir={tmp_path / 'run'}",
            f"--config.data.shards={shards}", "--config.distributed.method=addresses", f"--config.seed={index}",
            f"--config.distributed.coordinator=127.0.0.1:{port}", "--config.distributed.num_processes=2",
            f"--config.distributed.process_id={index}",
        ]  # fmt: skip
        processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "config seed is '1' there and '0' here" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()
