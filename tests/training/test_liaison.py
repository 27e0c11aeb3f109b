"""Processes of a job that are missing, disagree, die, hang or fail: real processes, really killed."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError
from infmae_jax.training import liaison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def job(port, *behaviours, **limits):
    """One process a behaviour, all met; killed at the end, whatever happens."""
    processes = []
    for index, behaviour in enumerate(behaviours):
        task = {"port": port, "index": index, "count": len(behaviours), "behaviour": behaviour, **limits}
        command = [sys.executable, "-m", "tests.training.liaison_process", json.dumps(task)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
    try:
        for process in processes:
            assert process.stdout.readline() == "met\n", process.stderr.read()
        for process in processes:
            print(file=process.stdin, flush=True)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process, timeout=20):
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def meet_all(port, facts, count, timeout):
    """`meet` in a thread a process: the results or exceptions by process."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(facts))) as pool:
        met = {
            index: pool.submit(liaison.meet, ("127.0.0.1", port), index, count, claim, timeout, 60.0, 0.0)
            for index, claim in facts.items()
        }
        return {index: future.exception() for index, future in met.items()}


def test_missing_processes_are_named_to_all_that_came(port):
    errors = meet_all(port, {0: {}, 2: {}}, 4, timeout=1.5)
    for error in errors.values():
        assert isinstance(error, liaison.ProcessesMissing) and error.exit_code == EXIT_LOST
        assert "process 1, 3 of 4 did not arrive" in str(error) and "within 1.5 s" in str(error)
        assert f"process 2 ({socket.gethostname()}, pid {os.getpid()})" in str(error) and "\n" not in str(error)


def test_missing_coordinator_is_named(port):
    errors = meet_all(port, {1: {}}, 2, timeout=1.0)
    assert isinstance(errors[1], liaison.ProcessesMissing)
    assert f"process 0 did not answer at 127.0.0.1:{port} within 1 s" in str(errors[1])


def test_processes_that_differ_say_in_what(port):
    claims = {0: {"data set": "a", "config seed": "0"}, 1: {"data set": "b", "config seed": "0"}}
    for error in meet_all(port, claims, 2, timeout=20.0).values():
        assert type(error) is InputError and error.exit_code == 2
        assert "data set is 'b' there and 'a' here" in str(error) and "seed" not in str(error)


def test_a_failure_right_behind_the_welcome_is_heard():
    first, second = socket.socketpair()
    with first, second:
        coordinator, other = liaison._Line(first), liaison._Line(second)
        coordinator.send("welcome")
        coordinator.send("end", code=2, message="shard 7 is damaged")
        assert other.receive(time.monotonic() + 5) == {"kind": "welcome"}
        assert other.read() == [{"kind": "end", "code": 2, "message": "shard 7 is damaged"}]


def test_strangers_at_the_port_change_nothing(port):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(liaison.meet, ("127.0.0.1", port), 0, 2, {}, 20.0, 60.0, 0.0)
        deadline = time.monotonic() + 10
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=1)
                break
            except OSError:
                assert time.monotonic() < deadline
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        second = pool.submit(liaison.meet, ("127.0.0.1", port), 1, 2, {}, 20.0, 60.0, 0.0)
        groups = [first.result(timeout=20), second.result(timeout=20)]
    stranger.close()
    for group in groups:
        group.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_by_name(port, victim):
    with job(port, "work", "work", "work") as processes:
        processes[victim].send_signal(signal.SIGKILL)
        for index, process in enumerate(processes):
            if index != victim:
                code, errors = ended(process)
                assert code == EXIT_LOST
                assert f"process {victim} " in errors and "ended without a word" in errors
                if victim:  # of process 0 the others know no more than its address
                    assert f"pid {processes[victim].pid}" in errors


def test_a_frozen_process_is_missed(port):
    with job(port, "work", "work", silence=3.0) as processes:
        processes[1].send_signal(signal.SIGSTOP)
        code, errors = ended(processes[0])
        assert code == EXIT_LOST and "has sent nothing for 3 s" in errors and "process 1 " in errors
        processes[1].send_signal(signal.SIGCONT)
        assert ended(processes[1])[0] == EXIT_LOST


def test_a_process_that_hangs_is_found_behind_those_that_wait_for_it(port):
    with job(port, "wait", "hang", "wait", stall=3.0) as processes:
        for process in processes:
            code, errors = ended(process)
            assert code == EXIT_LOST
            assert "no step for 3 s, most likely because of process 1 " in errors
            assert "process 1 reading data at step 3, process 2 training at step 4" in errors


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_all_with_the_same_code(port, failing):
    behaviours = ["work", "work"]
    behaviours[failing] = "fail"
    with job(port, *behaviours) as processes:
        code, errors = ended(processes[1 - failing])
        assert code == 2 and f"process {failing} " in errors and "failed: shard 7 is damaged" in errors
        assert ended(processes[failing])[0] == 2


def test_ending_in_order_alarms_nobody(port):
    with job(port, "work", "finish") as processes:
        assert ended(processes[1])[0] == 0
        time.sleep(2 * liaison.PULSE_SECONDS)
        assert processes[0].poll() is None
