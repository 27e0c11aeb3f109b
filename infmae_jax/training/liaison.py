"""How the processes of one job watch each other: who is missing at the start, who died, who hangs.

Process 0 listens beside the coordinator; the others connect to it and stay connected. JSON lines go both ways:

    hello      once, to process 0: who this is and the facts that all must agree on
    welcome    once, from process 0, when all have arrived and agree
    progress   every few seconds, both ways: the step, what the process is doing and for how long
    failed     a process ends with an error: exit code and message
    end        from process 0: everybody ends now, with this exit code and message
    bye        a process ends in order

JAX itself ends a process by an abort, without a name, 100 s after another one died. Here the others end within a
second, and say which process it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError

PULSE_SECONDS = 2.0
_CONNECT_PAUSE = 0.2
_LONGEST_LINE = 1 << 22
_GRACE_SECONDS = 2.0  # for messages on their way before a process ends
LOOPING = "training"  # the activity in which a step is expected every now and then


class ProcessesMissing(InputError):
    """Not all processes of the job arrived in time."""

    exit_code = EXIT_LOST


@dataclasses.dataclass
class Member:
    """What is known of a process: where it runs, and what it said last."""

    index: int
    host: str = socket.gethostname()
    pid: int = os.getpid()
    step: int = 0
    activity: str = "starting"
    since: float = dataclasses.field(default_factory=time.monotonic)  # when its step or activity last changed
    heard: float = dataclasses.field(default_factory=time.monotonic)
    gone: bool = False

    def __str__(self) -> str:
        return f"process {self.index} ({self.host}, pid {self.pid})"

    def update(self, step: int, activity: str) -> None:
        self.heard = time.monotonic()
        if (step, activity) != (self.step, self.activity):
            self.step, self.activity, self.since = step, activity, self.heard


class _Line:
    """A connection that carries JSON lines."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._pending = b""
        self._lock = threading.Lock()

    def send(self, kind: str, **content: Any) -> None:
        """Sends a message; a closed connection is noticed by whoever reads."""
        data = json.dumps({"kind": kind, **content}).encode() + b"\n"
        with contextlib.suppress(OSError), self._lock:
            self.socket.sendall(data)

    def read(self, first_only: bool = False) -> list[dict[str, Any]] | None:
        """Messages that have arrived (blocks for the first bytes); None at the end of the connection.

        With `first_only` those behind the first stay in the connection, where whoever selects on it sees them.
        """
        try:
            if first_only:
                data = self.socket.recv(1 << 16, socket.MSG_PEEK)
                data = self.socket.recv(data.find(b"\n") + 1 or len(data))
            else:
                data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data or len(self._pending) > _LONGEST_LINE:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None  # not one of ours

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None at the end of the connection or after the deadline (monotonic seconds)."""
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            messages = self.read(first_only=True)
            if messages is None or messages:
                self.socket.settimeout(None)
                return messages[0] if messages else None
        return None


def meet(
    address: tuple[str, int],
    index: int,
    count: int,
    facts: Mapping[str, str],
    timeout: float,
    silence: float,
    stall: float,
) -> Liaison:
    """Waits until all processes of the job are there and agree.

    Args:
      address: host and port at which process 0 listens.
      index, count: this process, and how many there are.
      facts: what must be the same on all processes, by name.
      timeout: seconds to wait for all.
      silence: seconds after which a process that sends nothing counts as lost.
      stall: seconds without a step of anybody, while training, after which the job ends; 0: never.

    Raises:
      ProcessesMissing: after the timeout, with the names of those that are missing.
      InputError: the facts differ; names the fact and the processes.
    """
    me = Member(index)
    deadline = time.monotonic() + timeout
    if index == 0:
        members, lines = _gather(address, me, count, facts, deadline, timeout)
    else:
        members, lines = _join(address, me, facts, deadline, timeout)
    return Liaison(me, members, lines, silence, stall)


def _gather(
    address: tuple[str, int], me: Member, count: int, facts: Mapping[str, str], deadline: float, timeout: float
) -> tuple[dict[int, Member], dict[int, _Line]]:
    """Process 0: accepts the others."""
    members, lines, claims = {0: me}, {}, {0: dict(facts)}
    try:
        listener = socket.create_server(("", address[1]), family=socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"port {address[1]} of this machine cannot be opened ({error.strerror}); choose another "
            "distributed.coordinator port (it and the one below must be free)"
        ) from error
    with listener:
        while len(members) < count and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                line = _Line(listener.accept()[0])
            except TimeoutError:
                break
            hello = line.receive(min(deadline, time.monotonic() + 5.0))
            if hello is None or hello.get("kind") != "hello":
                continue
            member = Member(hello["index"], hello["host"], hello["pid"])
            members[member.index], lines[member.index], claims[member.index] = member, line, hello["facts"]
    problem: InputError | None = None
    missing = sorted(set(range(count)) - set(members))
    if missing:
        present = ", ".join(str(members[i]) for i in sorted(members))
        problem = ProcessesMissing(
            f"process {', '.join(map(str, missing))} of {count} did not arrive at {address[0]}:{address[1]} within "
            f"{timeout:g} s; here are {present}: start the missing ones, or correct distributed.num_processes"
        )
    elif disagreement := _disagreement(claims, members):
        problem = InputError(disagreement)
    if problem is not None:
        for line in lines.values():
            line.send("end", code=problem.exit_code, message=str(problem))
        raise problem
    for line in lines.values():
        line.send("welcome")
    return members, lines


def _join(
    address: tuple[str, int], me: Member, facts: Mapping[str, str], deadline: float, timeout: float
) -> tuple[dict[int, Member], dict[int, _Line]]:
    """Every other process: connects to process 0 and waits for its word."""
    where = f"{address[0]}:{address[1]}"
    connection = None
    while connection is None:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessesMissing(
                    f"process 0 did not answer at {where} within {timeout:g} s ({error.strerror or error}); start it, "
                    "or correct distributed.coordinator"
                ) from error
            time.sleep(_CONNECT_PAUSE)
    line = _Line(connection)
    line.send("hello", index=me.index, host=me.host, pid=me.pid, facts=dict(facts))
    word = line.receive(deadline + 5.0)  # process 0 speaks at its own deadline
    if word is None or word["kind"] not in ("welcome", "end"):
        raise ProcessesMissing(f"process 0 at {where} went away before all processes had arrived; start all again")
    if word["kind"] == "end":
        error = ProcessesMissing if word["code"] == EXIT_LOST else InputError
        raise error(word["message"])
    return {0: Member(0, address[0], 0), me.index: me}, {0: line}


def _disagreement(claims: Mapping[int, Mapping[str, str]], members: Mapping[int, Member]) -> str:
    """One line on the first facts that differ from those of process 0; empty when all agree."""
    for index, claim in sorted(claims.items()):
        names = [n for n in sorted(claim.keys() | claims[0].keys()) if claim.get(n) != claims[0].get(n)]
        if names:
            values = "; ".join(f"{n} is {claim.get(n)!r} there and {claims[0].get(n)!r} here" for n in names[:5])
            return f"{members[index]} differs from {members[0]}: {values}; start all with equal code, config and data"
    return ""


class Liaison:
    """The standing connections of a job; a thread watches them and ends this process when the job is lost."""

    def __init__(
        self,
        me: Member,
        members: dict[int, Member],
        lines: dict[int, _Line],
        silence: float,
        stall: float,
        leave: Callable[[int], None] = os._exit,
    ):
        self._me, self._members, self._lines = me, members, lines
        self._silence, self._stall, self._leave = silence, stall, leave
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="liaison", daemon=True)
        self._thread.start()

    def progress(self, step: int, activity: str = LOOPING) -> None:
        """Says what this process is doing; microseconds."""
        self._me.update(step, activity)

    def close(self) -> None:
        """Ends in order: the others do not take the end of the connection for a death."""
        self._closing = True
        for line in self._lines.values():
            line.send("bye")

    def fail(self, code: int, message: str) -> None:
        """Tells the others that this process ends with an error; returns when they had time to hear it.

        An error may be the echo of another process's death: then this never returns, as that is what ends the job.
        """
        if code == 1:
            self._thread.join(PULSE_SECONDS + _GRACE_SECONDS)
        self._closing = True
        text = f"{self._me} failed: {message}"
        for line in self._lines.values():
            line.send(*(("end",) if self._me.index == 0 else ("failed",)), code=code, message=text)
        time.sleep(_GRACE_SECONDS)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, index)
            spoken = 0.0
            while not self._closing:
                if time.monotonic() - spoken >= PULSE_SECONDS:
                    spoken = time.monotonic()
                    for line in self._lines.values():
                        line.send("progress", step=self._me.step, activity=self._me.activity)
                for key, _ in selector.select(PULSE_SECONDS / 4):
                    self._hear(selector, key.data)
                self._judge()

    def _hear(self, selector: selectors.BaseSelector, index: int) -> None:
        member, line = self._members[index], self._lines[index]
        messages = line.read()
        if messages is None:
            selector.unregister(line.socket)
            if not member.gone and not self._closing:
                self._end(EXIT_LOST, f"{member} ended without a word while the job was {self._me.activity}")
            return
        for message in messages:
            if message["kind"] == "progress":
                member.update(message["step"], message["activity"])
            elif message["kind"] == "bye":
                member.gone = True
            elif message["kind"] in ("failed", "end"):
                member.gone = True
                self._end(message["code"], message["message"])

    def _judge(self) -> None:
        now = time.monotonic()
        others = [m for m in self._members.values() if m is not self._me and not m.gone and m.index in self._lines]
        for member in others:
            if now - member.heard > self._silence:
                self._end(EXIT_LOST, f"{member} has sent nothing for {self._silence:g} s, last at step {member.step}")
        everybody = sorted([self._me, *others], key=lambda member: member.index)
        if self._me.index or not self._stall or any(now - m.since < self._stall for m in everybody):
            return
        behind = min(everybody, key=lambda m: (m.step, m.activity == LOOPING))
        states = ", ".join(f"process {m.index} {m.activity} at step {m.step}" for m in everybody)
        self._end(EXIT_LOST, f"no step for {self._stall:g} s, most likely because of {behind}: {states}")

    def _end(self, code: int, message: str) -> None:
        """Ends this process, and as process 0 all others: whatever the main thread waits for will not come."""
        if self._closing:
            return
        self._closing = True
        if self._me.index == 0:
            for line in self._lines.values():
                line.send("end", code=code, message=message)
            time.sleep(_GRACE_SECONDS)  # clients of a coordinator that vanishes abort before they have read why
        remedy = "; checkpoints are intact: start all processes again" if code == EXIT_LOST else ""
        print(f"error: {message}{remedy}", file=sys.stderr, flush=True)
        self._leave(code)
