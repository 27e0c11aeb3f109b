"""Faults for training jobs: each harms a running job, or what it has written, and says how the job must end."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from tests.training.jobs import Job, beginnings, checkpoints, rows_of

DISK = "24m"


class TooLate(Exception):
    """The run had finished before the fault struck."""


class Disk:
    """A small file system for run folders; without the right to mount one, fullness is played by a file-size limit."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def full(self, job: Job, spare: int):
        """All but `spare` bytes are taken."""
        if not self.mounted:
            for process in job.processes:
                psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (max(spare, 20_000), -1))
            yield
            return
        filler = self.folder / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)) == 1 << 16:
                    pass
            with filler.open("r+b") as file:
                file.truncate(max(0, filler.stat().st_size - spare))
            yield
        finally:
            filler.unlink()

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


class Fault:
    """One fault: `strike` harms the job (and waits for its end), `heal` mends what a person would mend afterwards."""

    def __init__(self, job: Job, rng: np.random.Generator, disk: Disk, shards: Path, steps: int):
        self.job, self.rng, self.disk, self.shards, self.steps = job, rng, disk, shards, steps
        self.damaged_newest = False

    def moment(self) -> None:
        """Some time after the process has begun to make steps, most often in the first half of those that are left."""
        started = len(beginnings(self.job.run))
        self.wait_until(lambda: len(beginnings(self.job.run)) > started)
        at = beginnings(self.job.run)[-1]
        at += int(self.rng.uniform(0, 0.5) * (self.steps - at))
        self.wait_until(lambda: rows_of(self.job.run)[-1:] and rows_of(self.job.run)[-1]["step"] >= at, pause=0.005)
        time.sleep(self.rng.uniform(0, 0.05))
        self.check_running()

    def check_running(self) -> None:
        if not self.job.running:
            raise TooLate

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.02) -> None:
        if not self.job.wait_until(condition, pause):
            raise TooLate

    def victim(self) -> subprocess.Popen:
        return self.job.processes[int(self.rng.integers(len(self.job.processes)))]

    def ended(self, *codes: int) -> str:
        """Waits for all processes; the victim of a signal ends by it, the others with one of `codes`."""
        results = self.job.ended(240)
        if all(code == 0 for code, _, _ in results):
            raise TooLate
        for code, _, errors in results:
            if code == -signal.SIGABRT and results[0][0] == -signal.SIGKILL:
                continue  # JAX's own end of a process whose coordinator is gone: launchers start it again as well
            assert code in codes, f"exit code {code}, expected one of {codes}: {errors}"
        self.job.assert_no_orphans()
        return "\n".join(errors for _, _, errors in results)


def kill(fault: Fault) -> None:
    fault.moment()
    fault.victim().send_signal(signal.SIGKILL)
    fault.ended(-9, 76)


def kill_inside_a_save(fault: Fault) -> None:
    fault.moment()
    folder = fault.job.run / "checkpoints"
    fault.wait_until(lambda: any(folder.glob("*orbax-checkpoint-tmp*")), pause=0.001)
    time.sleep(fault.rng.uniform(0, 0.1))
    fault.victim().send_signal(signal.SIGKILL)
    fault.ended(-9, 76)


def terminate(fault: Fault) -> None:
    fault.moment()
    fault.victim().send_signal(signal.SIGTERM)
    fault.ended(75)


def kill_a_worker(fault: Fault) -> None:
    fault.moment()
    parent = psutil.Process(fault.victim().pid)
    workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    if not workers:
        fault.check_running()
    workers[int(fault.rng.integers(len(workers)))].kill()
    assert "data workers died" in fault.ended(76)


def freeze(fault: Fault) -> None:
    """Of one process nothing is heard: the others end it all."""
    fault.moment()
    frozen = fault.victim()
    frozen.send_signal(signal.SIGSTOP)
    for process in fault.job.processes:
        if process is not frozen:
            assert process.wait(120) == 76
    frozen.send_signal(signal.SIGKILL)
    assert "has sent nothing for" in fault.ended(-9, 76)


def truncate(fault: Fault) -> None:
    file = _file_of_newest(fault)
    with file.open("r+b") as opened:
        opened.truncate(int(fault.rng.integers(file.stat().st_size)))


def flip_a_bit(fault: Fault) -> None:
    file = _file_of_newest(fault)
    content = bytearray(file.read_bytes())
    content[int(fault.rng.integers(len(content)))] ^= 1 << int(fault.rng.integers(8))
    file.write_bytes(content)


def _file_of_newest(fault: Fault) -> Path:
    """Kills the job when it has two checkpoints or more; a file of the newest, most often that with the arrays."""
    fault.moment()
    fault.wait_until(lambda: len(checkpoints(fault.job.run)) >= 2)
    fault.victim().send_signal(signal.SIGKILL)
    fault.ended(-9, 76)
    fault.damaged_newest = True
    newest = fault.job.run / "checkpoints" / str(checkpoints(fault.job.run)[-1])
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in files], float)
    return files[int(fault.rng.choice(len(files), p=np.sqrt(sizes) / np.sqrt(sizes).sum()))]


def fill_the_disk(fault: Fault) -> None:
    fault.moment()
    with fault.disk.full(fault.job, spare=int(fault.rng.integers(1 << 19))):
        message = fault.ended(2)
    assert re.search("disk is full|No space left|file would be too large", message), message


def corrupt_a_record(fault: Fault) -> None:
    """A shard goes bad while it is read; it is brought back afterwards."""
    fault.moment()
    shard = sorted(fault.shards.glob("*.array_record"))[0]
    whole = shard.read_bytes()
    content = bytearray(whole)
    start = int(fault.rng.integers(len(content) // 4))
    content[start : start + len(content) // 4] = bytes(len(content) // 4)
    try:
        shard.write_bytes(content)
        message = fault.ended(2)
        assert "record" in message and "prepare the shards again" in message, message
    finally:
        shard.write_bytes(whole)


ONE_PROCESS: dict[str, Callable[[Fault], None]] = {
    "SIGKILL": kill, "SIGKILL inside a save": kill_inside_a_save, "SIGTERM": terminate, "worker killed": kill_a_worker,
    "newest checkpoint truncated": truncate, "bit flipped in newest checkpoint": flip_a_bit,
    "disk full": fill_the_disk, "shard record corrupt": corrupt_a_record,
}  # fmt: skip
TWO_PROCESSES: dict[str, Callable[[Fault], None]] = {
    "one host killed": kill, "one host killed inside a save": kill_inside_a_save, "one host gets SIGTERM": terminate,
    "one host frozen": freeze, "bit flipped in newest checkpoint": flip_a_bit,
}  # fmt: skip
