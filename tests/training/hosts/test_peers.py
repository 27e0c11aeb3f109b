"""Processes of a job that are missing, disagree, die, hang or fail, and strangers among them.

A process is a thread here; what only the operating system can do to a process is done to real ones.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError
from infmae_jax.training.config import DistributedConfig
from infmae_jax.training.hosts import channel
from infmae_jax.training.hosts import peers as hosts

ROOT = Path(__file__).resolve().parents[3]
SECRET = "a secret of these tests"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(channel.SECRET_VARIABLE, SECRET)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(hosts, "PULSE_SECONDS", 0.1)
    monkeypatch.setattr(hosts, "_GRACE_SECONDS", 0.2)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meeting(port, claims, count, timeout=20.0, silence=60.0, stall=0.0, leave=None):
    """`meet` in a thread for each process: futures by process."""
    leave = leave or (lambda index, code: os._exit(code))
    config = DistributedConfig(timeout_seconds=timeout, heartbeat_seconds=silence, stall_seconds=stall)
    pool = concurrent.futures.ThreadPoolExecutor(len(claims))
    return {
        index: pool.submit(
            hosts.meet, ("127.0.0.1", port), index, count, claim, config, functools.partial(leave, index)
        )
        for index, claim in claims.items()
    }


class Job:
    """Processes that have met. `codes` are the exit codes with which they ended, by process."""

    def __init__(self, port, count, **limits):
        self.codes, self.changed = {}, threading.Condition()
        met = meeting(port, dict.fromkeys(range(count), {}), count, leave=self._leave, **limits)
        self.peers = [future.result(timeout=20) for future in met.values()]

    def _leave(self, index, code):
        with self.changed:
            self.codes.setdefault(index, code)
            self.changed.notify()
        self.freeze(index, closed=True)

    def freeze(self, index, closed=False):
        """Nothing comes from this process any more; `closed`: nor from its connections, as when it was killed."""
        self.peers[index]._closing.set()
        for member in self.peers[index]._others if closed else ():
            member.line.close()

    def ended(self, *indices):
        with self.changed:
            assert self.changed.wait_for(lambda: set(indices) <= self.codes.keys(), timeout=20)
        return [self.codes[index] for index in indices]


@pytest.fixture
def job(port, quick):
    jobs = []

    def start(count, **limits):
        jobs.append(Job(port, count, **limits))
        return jobs[-1]

    yield start
    for made in jobs:
        for index in range(len(made.peers)):
            made.freeze(index, closed=True)


def errors_of(met):
    return {index: future.exception(timeout=30) for index, future in met.items()}


def test_missing_processes_are_named_to_all_that_came(port):
    errors = errors_of(meeting(port, {0: {}, 2: {}}, 4, timeout=1.5))
    for error in errors.values():
        assert isinstance(error, hosts.ProcessesMissing) and error.exit_code == EXIT_LOST
        assert "process 1, 3 of 4 did not arrive" in str(error) and "within 1.5 s" in str(error)
        assert f"process 2 ({socket.gethostname()}, pid {os.getpid()})" in str(error) and "\n" not in str(error)


def test_missing_coordinator_is_named(port):
    errors = errors_of(meeting(port, {1: {}}, 2, timeout=1.0))
    assert isinstance(errors[1], hosts.ProcessesMissing)
    assert f"process 0 did not answer at 127.0.0.1:{port} within 1 s" in str(errors[1])


def test_processes_that_differ_say_in_what(port):
    claims = {0: {"data set": "a", "config seed": "0"}, 1: {"data set": "b", "config seed": "0"}}
    for error in errors_of(meeting(port, claims, 2)).values():
        assert type(error) is InputError and error.exit_code == 2
        assert "data set is 'b' there and 'a' here" in str(error) and "seed" not in str(error)


def test_two_processes_cannot_be_the_same_one(port):
    first = meeting(port, {0: {}, 1: {}}, 3, timeout=4.0)
    time.sleep(0.5)
    for index in (1, 7):
        (error,) = errors_of(meeting(port, {index: {}}, 3)).values()
        assert isinstance(error, InputError) and f"process {index} " in str(error) and "turned away" in str(error)
        assert "distributed.process_id" in str(error)
    for error in errors_of(first).values():  # the first one kept its place
        assert "process 2 of 3 did not arrive" in str(error)


def test_a_process_that_is_started_again_takes_its_place_again(port, job):
    first = meeting(port, {0: {}}, 3, leave=lambda index, code: None)
    with dead_member(port, 1):
        pass
    rest = meeting(port, {2: {}}, 3, leave=lambda index, code: None)
    time.sleep(0.5)  # all have arrived now, one of them is dead: the job must wait for it
    rest |= meeting(port, {1: {}}, 3, leave=lambda index, code: None)
    for future in (first | rest).values():
        future.result(timeout=20).close()


@contextlib.contextmanager
def dead_member(port, index):
    """A process that arrives and dies."""
    line = connect(port)
    line.send("knock")
    line.receive(time.monotonic() + 5, "open")
    line.send("hello", index, json.dumps(["h, pid 1", {}]))
    time.sleep(0.2)
    yield
    line.close()


def connect(port, secret=SECRET):
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=2)
            return channel.Line(connection, secret.encode(), process_0=False, deadline=time.monotonic() + 5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


HELLO = json.dumps(["hello", 1, json.dumps(["h", {}])]).encode() + b"\n"
END = json.dumps(["end", 0, "finished"]).encode() + b"\n"
STRANGERS = {
    "silent": b"",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "hello without a greeting": HELLO,
    "hello with a made-up MAC": b"0" * 32 + b"\n" + b"0" * 64 + b" " + HELLO,
    "end": b"0" * 32 + b"\n" + END,
    "no object": b"0" * 32 + b"\n" + b"[[[[1]]]]\n",
    "zero bytes": bytes(1 << 16),
    "a line that never ends": b"a" * (1 << 20),
    "bytes that are no text": b"\xff\xfe\n" * 10,
}


class Strangers:
    """Connections to a port, each of which says something; closed at the end."""

    def __init__(self, port, each):
        self.connections = []
        for said in STRANGERS.values():
            for _ in range(each):
                connection = socket.create_connection(("127.0.0.1", port), timeout=2)
                with contextlib.suppress(OSError):
                    connection.sendall(said)
                self.connections.append(connection)

    def heard(self):
        """What each of them was told; closes them."""
        for connection in self.connections:
            connection.settimeout(0.05)
            heard = b""
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(1 << 16):
                    heard += data
            yield heard


def test_strangers_while_processes_gather_change_nothing_and_learn_nothing(port):
    claims = {0: {"config data.shards": "/private"}, 1: {"config data.shards": "/private"}}
    first = meeting(port, {0: claims[0]}, 2, leave=lambda index, code: None)
    connect(port, "another secret of no use").send("knock")
    strangers = Strangers(port, each=7)
    started = time.monotonic()
    second = meeting(port, {1: claims[1]}, 2, leave=lambda index, code: None)
    groups = [future.result(timeout=20) for future in (first | second).values()]
    assert time.monotonic() - started < 5  # 63 connections that may say nothing did not hold the start up
    for heard in strangers.heard():
        assert len(heard) in (0, 33)  # a random greeting at most
    with pytest.raises(OSError):  # and afterwards nobody listens
        socket.create_connection(("127.0.0.1", port), timeout=1)
    assert not any(peers._closing.is_set() for peers in groups)
    for peers in groups:
        peers.close()


def test_a_stranger_at_the_port_of_process_0_learns_nothing(port):
    """The other processes wait for process 0, and a stranger is there first."""
    with socket.create_server(("127.0.0.1", port)) as server:
        met = meeting(port, {1: {"config data.shards": "/private"}}, 2, timeout=1.5)
        connection, _ = server.accept()
        connection.sendall(b"0" * 32 + b"\n" + b"0" * 64 + b' ["open", 0, ""]\n')
        connection.settimeout(5)
        heard = b""
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                heard += data
    assert heard.count(b"\n") == 2 and b"private" not in heard and socket.gethostname().encode() not in heard
    assert isinstance(errors_of(met)[1], hosts.ProcessesMissing)


def test_processes_with_different_secrets_do_not_meet(port, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        first = meeting(port, {0: {}}, 2, timeout=2.0)
        time.sleep(0.3)
        monkeypatch.setenv(channel.SECRET_VARIABLE, "the secret of another job")
        second = meeting(port, {1: {}}, 2, timeout=2.0)
        errors = errors_of(first | second)
    assert "process 1 of 2 did not arrive" in str(errors[0])
    assert "connections without the job's secret were refused" in str(errors[0])
    assert "does not share this process's INFMAE_JOB_SECRET" in caplog.text
    assert isinstance(errors[1], hosts.ProcessesMissing)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_by_name(job, victim, capsys):
    running = job(3)
    running.freeze(victim, closed=True)
    others = {0, 1, 2} - {victim}
    assert set(running.ended(*others)) == {EXIT_LOST}
    errors = capsys.readouterr().err
    assert errors.count(f"process {victim} ({socket.gethostname()}, pid {os.getpid()}) ended without a word") == 2


def test_a_silent_process_is_missed(job, capsys):
    running = job(2, silence=0.6)
    running.freeze(1)
    assert running.ended(0) == [EXIT_LOST]
    errors = capsys.readouterr().err
    assert "process 1 " in errors and "has sent nothing for 0.6 s" in errors


def test_a_process_that_hangs_is_found_behind_those_that_wait_for_it(job, capsys):
    running = job(3, stall=1.0)
    for index, (step, activity) in enumerate([(4, "training"), (3, "reading data"), (4, "training")]):
        running.peers[index].progress(step, activity)
    assert running.ended(0, 1, 2) == [EXIT_LOST] * 3
    errors = capsys.readouterr().err
    assert errors.count("no step for 1 s, most likely because of process 1 ") == 3
    assert "process 1 reading data at step 3, process 2 training at step 4" in errors


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_all_with_the_same_code(job, failing, capsys):
    running = job(3)
    running.peers[failing].fail(2, "shard 7 is damaged\x1b[2J")
    assert running.ended(*{0, 1, 2} - {failing}) == [2, 2]
    errors = capsys.readouterr().err
    assert errors.count(f"process {failing} ") == errors.count("failed: shard 7 is damaged") == 2
    assert "\x1b" not in errors


@pytest.mark.parametrize("code", [0, 7, 256])
def test_no_process_can_end_a_job_as_done(job, code):
    running = job(2)
    running.peers[1]._send("end", code, "finished")
    assert running.ended(0) == [EXIT_LOST]


def test_a_failure_right_behind_the_welcome_is_heard():
    ends = socket.socketpair()
    with ends[0], ends[1], concurrent.futures.ThreadPoolExecutor(1) as pool:
        soon = time.monotonic() + 5
        first = pool.submit(channel.Line, ends[0], SECRET.encode(), True, soon)
        other, coordinator = channel.Line(ends[1], SECRET.encode(), False, soon), first.result()
        coordinator.send("welcome", text="h, pid 1")
        coordinator.send("end", 2, "shard 7 is damaged")
        assert other.receive(soon, "welcome") == ("welcome", 0, "h, pid 1")
        assert other.receive(soon, "end") == ("end", 2, "shard 7 is damaged")


def test_an_error_that_echoes_a_death_leaves_the_word_to_the_watcher(job):
    running = job(2)
    failing = threading.Thread(target=running.peers[0].fail, args=(1, "Gloo: connection closed"), daemon=True)
    failing.start()
    running.freeze(1, closed=True)
    assert running.ended(0) == [EXIT_LOST]


def test_ending_in_order_alarms_nobody(job):
    running = job(2, silence=0.5)
    running.peers[1].close()
    running.freeze(1, closed=True)
    time.sleep(1.0)
    assert running.codes == {}


@contextlib.contextmanager
def real_job(port, count, silence=20.0):
    """Real processes, all met; killed at the end, whatever happens."""
    processes = []
    for index in range(count):
        task = {"port": port, "index": index, "count": count, "silence": silence}
        command = [sys.executable, "-m", "tests.training.hosts.peers_process", json.dumps(task)]
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


def test_a_frozen_real_process_is_missed(port):
    with real_job(port, 2, silence=3.0) as processes:
        processes[1].send_signal(signal.SIGSTOP)
        code, errors = ended(processes[0])
        assert code == EXIT_LOST and "has sent nothing for 3 s" in errors and "process 1 " in errors
        processes[1].send_signal(signal.SIGCONT)
        assert ended(processes[1])[0] == EXIT_LOST


def test_a_killed_real_process_ends_the_other_by_name(port):
    with real_job(port, 2) as processes:
        processes[0].send_signal(signal.SIGKILL)
        code, errors = ended(processes[1])
        assert code == EXIT_LOST and "ended without a word" in errors
        assert f"process 0 ({socket.gethostname()}, pid {processes[0].pid})" in errors
