"""The secret of a job, and lines that nobody without it can make."""

import concurrent.futures
import contextlib
import resource
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from infmae_jax.training.hosts import channel

SECRET = b"a secret of these tests"


@contextlib.contextmanager
def wire(secrets=(SECRET, SECRET)):
    """Two ends of a connection and the sockets behind them: what one end sends waits there until it is passed on."""
    sockets = [socket.socketpair() for _ in range(2)]
    (first, raw_first), (second, raw_second) = sockets
    deadline = time.monotonic() + 5
    with concurrent.futures.ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        for end in (first, raw_first, second, raw_second):
            stack.enter_context(end)
        ends = [pool.submit(channel.Line, first, secrets[0], True, deadline),
                pool.submit(channel.Line, second, secrets[1], False, deadline)]  # fmt: skip
        raw_second.sendall(raw_first.recv(100))
        raw_first.sendall(raw_second.recv(100))
        yield *(end.result() for end in ends), raw_first, raw_second


def refused(line):
    with pytest.raises(channel.Refused):
        line.receive(time.monotonic() + 5, "progress", "end", "bye")


def sent(line, raw):
    line.send("progress", 7, "training")
    return raw.recv(1 << 16)


def test_a_line_arrives():
    with wire() as (coordinator, other, raw, raw_other):
        raw_other.sendall(sent(coordinator, raw))
        assert other.receive(time.monotonic() + 5, "progress") == ("progress", 7, "training")


def test_replayed_reordered_and_reflected_lines_are_refused():
    with wire() as (coordinator, other, raw, raw_other):
        text = sent(coordinator, raw)
        raw_other.sendall(text + text)
        other.receive(time.monotonic() + 5, "progress")
        refused(other)
    with wire() as (coordinator, other, raw, raw_other):
        first, second = sent(coordinator, raw), sent(coordinator, raw)
        raw_other.sendall(second + first)
        refused(other)
    with wire() as (coordinator, other, raw, raw_other):
        raw.sendall(sent(coordinator, raw))
        refused(coordinator)
    with wire() as (coordinator, _, raw, _), wire() as (_, other, _, raw_other):  # a line of another connection
        raw_other.sendall(sent(coordinator, raw))
        refused(other)


def test_lines_of_another_secret_are_refused():
    with wire((SECRET, b"some other secret")) as (coordinator, other, raw, raw_other):
        raw_other.sendall(sent(coordinator, raw))
        refused(other)


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(at, bit):
    with wire() as (coordinator, other, raw, raw_other):
        text = bytearray(sent(coordinator, raw)[:-1])
        text[int(at * len(text))] ^= 1 << bit
        raw_other.sendall(text + b"\n")
        refused(other)


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_refusal(data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for greeted in (False, True):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall((b"0" * 32 + b"\n" if greeted else b"") + data)
            theirs.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 5
            with pytest.raises(ConnectionError):
                channel.Line(ours, SECRET, True, deadline).receive(deadline, "knock")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kibibytes


def test_a_slow_stranger_has_no_more_time_than_a_silent_one():
    ours, theirs = socket.socketpair()
    with ours, theirs, concurrent.futures.ThreadPoolExecutor(1) as pool:
        line = pool.submit(channel.Line, ours, SECRET, True, time.monotonic() + 0.5)
        started = time.monotonic()
        while not line.done():
            theirs.sendall(b"0")
            time.sleep(0.05)
        assert isinstance(line.exception(), TimeoutError) and time.monotonic() - started < 3


@pytest.mark.parametrize(
    "message",
    [
        ("progress", -1, ""), ("progress", "7", ""), ("progress", 1e9, ""), ("progress", True, ""),
        ("progress", 1 << 60, ""), ("progress", 1, None), ("welcome", 0, ""), ("none", 0, ""), ([], 0, ""),
    ],
)  # fmt: skip
def test_messages_are_checked_though_their_sender_is_known(message):
    with wire() as (coordinator, other, raw, raw_other):
        coordinator.send(*message)
        raw_other.sendall(raw.recv(1 << 16))
        refused(other)


def test_what_is_printed_moves_no_cursor():
    with wire() as (coordinator, other, raw, raw_other):
        coordinator.send("end", 2, "\x1b]0;title\x07 and \u202e")
        raw_other.sendall(raw.recv(1 << 16))
        assert other.receive(time.monotonic() + 5, "end") == ("end", 2, " ]0;title  and  ")


def test_the_secret_must_be_long_enough(monkeypatch):
    monkeypatch.setenv(channel.SECRET_VARIABLE, "0123456789abcdef")
    assert channel.job_secret() == b"0123456789abcdef"
    monkeypatch.setenv(channel.SECRET_VARIABLE, "short")
    for unset in (False, True):
        with pytest.raises(InputError, match="INFMAE_JOB_SECRET must hold at least 16 characters"):
            channel.job_secret()
        if not unset:
            monkeypatch.delenv(channel.SECRET_VARIABLE)
