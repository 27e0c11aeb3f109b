"""Real training jobs for tests: started as users start them, watched through their run folders."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import psutil

from infmae_jax.training.checkpoint import restore_params
from infmae_jax.training.writers import read_events

ROOT = Path(__file__).resolve().parents[2]
SMOKE = f"--config={ROOT}/configs/pretrain/tiny_cpu.py:smoke"
PRETRAIN = ("infmae_jax.pretrain", SMOKE, "--config.picture_every=0 steps")
# Where the encoder is not the point: the one that compiles fastest.
SMALLEST = ("--config.model.encoder.kind=vit", "--config.model.encoder.depths=(1,1,1)")
# What must be the same bit for bit, whatever happened in between.
COMPARED = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def free_port() -> int:
    """A port of this machine that is free, and the one below too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server, contextlib.suppress(OSError, OverflowError):
            port = server.getsockname()[1]
            with socket.create_server(("127.0.0.1", port - 1)):
                return port


class Job:
    """The processes of one training job; use it as a context manager, which leaves none behind."""

    def __init__(self, run, shards, *flags, command=PRETRAIN, processes=1, devices=1, **popen):
        self.run = Path(run)
        port = free_port()
        self.processes, self._printed = [], []
        for index in range(processes):
            hosts = [] if processes == 1 else [
                "--config.distributed.method=addresses", f"--config.distributed.coordinator=127.0.0.1:{port}",
                f"--config.distributed.num_processes={processes}", f"--config.distributed.process_id={index}",
            ]  # fmt: skip
            arguments = f"--workdir={run}", f"--config.data.shards={shards}", *hosts, *flags
            environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
            # Files, not pipes: a process must not wait until a test reads what it prints.
            output, errors = (tempfile.TemporaryFile("w+") for _ in range(2))
            self._printed.append((output, errors))
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command, *arguments], cwd=ROOT, stdout=output, stderr=errors,
                    env=environment, start_new_session=True, **popen,
                )  # fmt: skip
            )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for process in self.processes:
            process.kill()
            process.wait()
        for file in itertools.chain(*self._printed):
            file.close()

    def ended(self, timeout=240):
        """(exit code, standard output, standard error) of every process."""
        deadline = time.monotonic() + timeout
        results = []
        for process, printed in zip(self.processes, self._printed, strict=True):
            try:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a process did not end within {timeout} s: {self.stacks()}") from None
            for file in printed:
                file.seek(0)
            results.append((process.returncode, *(file.read() for file in printed)))
        return results

    def succeeded(self, timeout=240):
        for code, _, errors in self.ended(timeout):
            assert code == 0, errors

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def stacks(self) -> str:
        """What every thread of every process is doing; ends them."""
        for process in self.processes:
            process.send_signal(signal.SIGQUIT)
        time.sleep(1.0)
        for process in self.processes:
            process.kill()
        return "\n".join(f"process {i}: {errors}" for i, (_, _, errors) in enumerate(self.ended()))

    def wait_until(self, condition, pause=0.02, timeout=240):
        """Until `condition()` holds; False when a process ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running:
                return False
            assert time.monotonic() < deadline, f"the run did not get there: {self.stacks()}"
            time.sleep(pause)
        return True

    def wait_for_row(self, step):
        """Until the run has logged this step; False when a process ended before."""
        return self.wait_until(lambda: any(row["step"] >= step for row in rows_of(self.run)))

    def relatives(self) -> list[psutil.Process]:
        """Living processes that the job's processes started, and they themselves."""
        sessions = {process.pid for process in self.processes}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def assert_no_orphans(self, timeout=15):
        deadline = time.monotonic() + timeout
        while left := self.relatives():
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.1)


def rows_of(run):
    """Whole lines of metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def beginnings(run):
    """The step at which each process (of the first host) began to make steps."""
    return [event["step"] for event in read_events(run) if event["event"] in ("start", "resume")]


def checkpoints(run):
    """Steps of the completed checkpoints, in order."""
    folder = Path(run) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def compared(run):
    return [[row[key] for key in COMPARED] for row in rows_of(run)]


def assert_same_run(run, other):
    """The whole loss sequence and the final parameters are equal bit for bit."""
    assert compared(run) == compared(other)
    ours, theirs = (restore_params(folder).params for folder in (run, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
