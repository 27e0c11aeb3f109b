"""Two runs never work in one folder, and a lock never outlives its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from infmae_jax.training.run_folder import workdir_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import subprocess, sys
from infmae_jax.training.run_folder import workdir_lock
with workdir_lock(sys.argv[1]):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], close_fds=False)
    print(child.pid, flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`, and has a child that was given all its inheritable descriptors."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.child = int(process.stdout.readline())
    yield process
    os.kill(process.child, signal.SIGKILL)
    process.kill()
    process.wait()


def test_second_run_is_told_who_holds_the_folder(holder, tmp_path):
    with pytest.raises(InputError) as caught, workdir_lock(tmp_path):
        pass
    message = str(caught.value)
    assert str(tmp_path) in message and f"process {holder.pid} on {os.uname().nodename} since 20" in message
    assert "--workdir" in message and "\n" not in message


def test_lock_is_released_at_the_end(holder, tmp_path):
    holder.stdin.close()
    assert "released" in holder.stdout.readline()
    with workdir_lock(tmp_path):
        pass


def test_killed_process_leaves_no_lock_though_its_child_lives(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    os.kill(holder.child, 0)  # the child is there
    with workdir_lock(tmp_path):
        pass


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), workdir_lock(tmp_path):
        raise RuntimeError("mine")
    with workdir_lock(tmp_path):
        pass


def test_unreadable_holder_still_keeps_others_out(holder, tmp_path):
    (tmp_path / ".lock").write_text("?")
    with pytest.raises(InputError, match="in use by another process"), workdir_lock(tmp_path):
        pass


def test_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workdir_lock(tmp_path):
        pass
    assert "without locks" in caplog.text


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run cannot be used as --workdir: Not a directory"):
        with workdir_lock(tmp_path / "file" / "run"):
            pass
