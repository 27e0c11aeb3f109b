"""How the processes of one job watch each other: who is missing at the start, who died, who hangs.

Process 0 listens beside the coordinator; the others connect to it and stay connected. Messages, see `channel` for who
is heard at all:

    knock, open  the ends prove to each other that they know the job's secret; before, neither says anything
    hello        to process 0: who this is and the facts that all must agree on
    welcome      from process 0, when all have arrived and agree
    progress     every few seconds, both ways: the step and what the process is doing
    failed       a process ends with an error: exit code and message
    end          from process 0: everybody ends now, with this exit code and message
    bye          a process ends in order

JAX itself ends a process by an abort that names nobody, also when not all arrive. Here the others end within a second,
and say which process it was.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from data_pipelines.commands import EXIT_LOST
from data_pipelines.errors import InputError
from infmae_jax.training.hosts.channel import SECRET_VARIABLE, Line, Refused, job_secret

PULSE_SECONDS = 2.0
GREETING_SECONDS = 10.0  # in which a connection must have said who it is
_MOST_GREETINGS = 256  # at the same time
_CONNECT_PAUSE = 0.2
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
    gone: bool = False

    def __str__(self) -> str:
        return f"process {self.index} ({self.host}, pid {self.pid})"

    def update(self, step: int, activity: str) -> None:
        if (step, activity) != (self.step, self.activity):
            self.step, self.activity, self.since = step, activity, time.monotonic()


class NoPeers:
    """The peers of a job of one process."""

    def progress(self, step: int, activity: str = LOOPING) -> None:
        """Nobody listens."""


def meet(
    address: tuple[str, int],
    index: int,
    count: int,
    facts: Mapping[str, str],
    timeout: float,
    silence: float,
    stall: float,
    leave: Callable[[int], None] = os._exit,
) -> "Peers":
    """Waits until all processes of the job are there and agree.

    Args:
      address: host and port at which process 0 listens.
      index, count: this process, and how many there are.
      facts: what must be the same on all processes, by name.
      timeout: seconds to wait for all.
      silence: seconds after which a process that sends nothing counts as lost.
      stall: seconds without a step of any process, while training, after which the job ends; 0: never.
      leave: ends this process with an exit code, from any thread.

    Raises:
      ProcessesMissing: after the timeout, with the names of those that are missing.
      InputError: the facts differ (names the fact and the processes), or this process has no usable secret.
    """
    me, secret, deadline = Member(index), job_secret(), time.monotonic() + timeout
    if index:
        return Peers(me, {0: _join(address, me, facts, secret, deadline, timeout)}, silence, stall, leave)
    try:
        listener = socket.create_server((bind_host(address[0]), address[1]), family=socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"port {address[1]} of this machine cannot be opened ({error.strerror}); choose another "
            "distributed.coordinator port (it and the one below must be free)"
        ) from error
    gathering = _Gathering(me, count, secret, facts)
    with listener:
        accepting = threading.Thread(target=gathering.accept, args=(listener,), daemon=True)
        accepting.start()
        with gathering.changed:
            gathering.changed.wait_for(lambda: len(gathering.arrived) == count - 1, timeout)
            gathering.over = True
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        accepting.join(1.0)
    gathering.judge(address, timeout)
    return Peers(me, gathering.arrived, silence, stall, leave)


def bind_host(host: str) -> str:
    """Where process 0 listens for a coordinator of this name: this machine only if the name says so, else everywhere."""
    return "127.0.0.1" if host == "localhost" or host.startswith("127.") else ""


class _Gathering:
    """Process 0 while the others arrive. Every connection has a thread of its own, and little time to say who it is."""

    def __init__(self, me: Member, count: int, secret: bytes, facts: Mapping[str, str]):
        self.arrived: dict[int, tuple[Member, Line]] = {}
        self.changed, self.over = threading.Condition(), False
        self._me, self._count, self._secret = me, count, secret
        self._claims, self._refused = {0: dict(facts)}, 0
        self._greetings = threading.BoundedSemaphore(_MOST_GREETINGS)

    def accept(self, listener: socket.socket) -> None:
        while not self.over:
            try:
                connection, _ = listener.accept()
            except OSError:  # the listener is closed, or there are too many connections just now
                time.sleep(0.01)
                continue
            if self._greetings.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _greet(self, connection: socket.socket) -> None:
        limit = time.monotonic() + GREETING_SECONDS
        try:
            line = Line(connection, self._secret, process_0=True, deadline=limit)
            line.receive(limit, "knock")
            line.send("open")
            self._admit(line, line.receive(limit, "hello"))
        except Exception as error:  # whatever a stranger sends ends its connection and nothing else
            connection.close()
            if isinstance(error, Refused):
                self._refused += 1
        finally:
            self._greetings.release()

    def _admit(self, line: Line, hello: Mapping[str, Any]) -> None:
        member = Member(hello["index"], hello["host"], hello["pid"])
        with self.changed:
            before = self.arrived.get(member.index)
            taken = before is not None and not before[1].closed()  # a closed one was started again
            if self.over or taken or not 0 < member.index < self._count:
                reason = f"{before[0]} is already here" if taken else f"the job has {self._count} processes"
                text = f"{member} was turned away: {reason}; give each process its own distributed.process_id"
                line.send("end", code=EXIT_LOST, message=text)
                raise ConnectionAbortedError
            self.arrived[member.index] = member, line
            self._claims[member.index] = hello["facts"]
            self.changed.notify()

    def judge(self, address: tuple[str, int], timeout: float) -> None:
        """Welcomes all, or tells all why the job cannot begin and raises that."""
        members = {0: self._me} | {index: member for index, (member, _) in self.arrived.items()}
        problem: InputError | None = None
        if missing := sorted(set(range(self._count)) - members.keys()):
            present = ", ".join(str(members[i]) for i in sorted(members))
            strangers = f" ({self._refused} connections without the job's secret were refused)" if self._refused else ""
            problem = ProcessesMissing(
                f"process {', '.join(map(str, missing))} of {self._count} did not arrive at {address[0]}:{address[1]} "
                f"within {timeout:g} s{strangers}; here are {present}: start the missing ones, or correct "
                "distributed.num_processes"
            )
        elif disagreement := _disagreement(self._claims, members):
            problem = InputError(disagreement)
        for _, line in self.arrived.values():
            if problem is None:
                line.send("welcome", host=self._me.host, pid=self._me.pid)
            else:
                line.send("end", code=problem.exit_code, message=_printable(str(problem)))
        if problem is not None:
            raise problem


def _join(
    address: tuple[str, int], me: Member, facts: Mapping[str, str], secret: bytes, deadline: float, timeout: float
) -> tuple[Member, Line]:
    """Every other process: connects to process 0 and waits for its word."""
    where, warned = f"{address[0]}:{address[1]}", False
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
            limit = min(deadline, time.monotonic() + GREETING_SECONDS)
            line = Line(connection, secret, process_0=False, deadline=limit)
            line.send("knock")
            line.receive(limit, "open")
            break
        except OSError as error:
            refused = isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError)
            reason = f"it does not share this process's {SECRET_VARIABLE}" if refused else error.strerror or str(error)
            if time.monotonic() > deadline:
                raise ProcessesMissing(
                    f"process 0 did not answer at {where} within {timeout:g} s ({reason}); start it, or correct "
                    "distributed.coordinator"
                ) from error
            if refused and not warned:
                logging.warning("%s turned this process away: %s, or is another program; trying on", where, reason)
                warned = True
            time.sleep(_CONNECT_PAUSE)
    line.send("hello", index=me.index, host=me.host, pid=me.pid, facts=dict(facts))
    try:
        word = line.receive(deadline + GREETING_SECONDS, "welcome", "end")  # process 0 speaks at its own deadline
    except OSError:
        raise ProcessesMissing(
            f"process 0 at {where} went away before all processes had arrived; start all again"
        ) from None
    if word["kind"] == "end":
        raise (ProcessesMissing if word["code"] == EXIT_LOST else InputError)(word["message"])
    return Member(0, word["host"], word["pid"]), line


def _disagreement(claims: Mapping[int, Mapping[str, str]], members: Mapping[int, Member]) -> str:
    """One line on the first facts that differ from those of process 0; empty when all agree."""
    for index, claim in sorted(claims.items()):
        names = [n for n in sorted(claim.keys() | claims[0].keys()) if claim.get(n) != claims[0].get(n)]
        if names:
            values = "; ".join(f"{n} is {claim.get(n)!r} there and {claims[0].get(n)!r} here" for n in names[:5])
            return f"{members[index]} differs from {members[0]}: {values}; start all with equal code, config and data"
    return ""


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:3000]


class Peers:
    """The other processes of a job; threads listen to them, and end this process when the job is lost."""

    def __init__(
        self,
        me: Member,
        others: Mapping[int, tuple[Member, Line]],
        silence: float,
        stall: float,
        leave: Callable[[int], None],
    ):
        self._me, self._others = me, dict(sorted(others.items()))
        self._silence, self._stall, self._leave = silence, stall, leave
        self._closing, self._ending = threading.Event(), threading.Lock()
        for member, line in self._others.values():
            threading.Thread(target=self._listen, args=(member, line), name=str(member), daemon=True).start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def progress(self, step: int, activity: str = LOOPING) -> None:
        """Says what this process is doing; microseconds."""
        self._me.update(step, activity)

    def close(self) -> None:
        """Ends in order: the others do not take the end of the connection for a death."""
        self._closing.set()
        self._send("bye")

    def fail(self, code: int, message: str) -> None:
        """Tells the others that this process ends with an error; returns when they had time to hear it.

        An error may be the echo of another process's death: then this never returns, as that is what ends the job.
        """
        if code == 1:
            self._closing.wait(PULSE_SECONDS + _GRACE_SECONDS)
        with self._ending:
            lost = self._closing.is_set()
            self._closing.set()
        if lost:  # another thread is ending this process
            return time.sleep(3 * _GRACE_SECONDS)
        self._send("failed" if self._me.index else "end", code=code, message=_printable(f"{self._me} failed: {message}"))
        time.sleep(_GRACE_SECONDS)

    def _send(self, kind: str, **content: Any) -> None:
        for _, line in self._others.values():
            line.send(kind, **content)

    def _listen(self, member: Member, line: Line) -> None:
        while not member.gone:
            try:
                message = line.receive(time.monotonic() + self._silence, "progress", "failed", "end", "bye")
            except TimeoutError:
                text = f"{member} has sent nothing for {self._silence:g} s, last at step {member.step}"
                return self._end(EXIT_LOST, text)
            except OSError:
                return self._end(EXIT_LOST, f"{member} ended without a word while the job was {self._me.activity}")
            member.gone = message["kind"] != "progress"
            if message["kind"] == "progress":
                member.update(message["step"], message["activity"])
            elif message["kind"] != "bye":
                return self._end(message["code"], message["message"])

    def _pulse(self) -> None:
        while not self._closing.is_set():
            self._send("progress", step=self._me.step, activity=self._me.activity)
            self._find_stall()
            self._closing.wait(PULSE_SECONDS)

    def _find_stall(self) -> None:
        present = [self._me, *(member for member, _ in self._others.values() if not member.gone)]
        if self._me.index or not self._stall or any(time.monotonic() - m.since < self._stall for m in present):
            return
        behind = min(present, key=lambda m: (m.step, m.activity == LOOPING))
        states = ", ".join(f"process {m.index} {m.activity} at step {m.step}" for m in present)
        self._end(EXIT_LOST, f"no step for {self._stall:g} s, most likely because of {behind}: {states}")

    def _end(self, code: int, message: str) -> None:
        """Ends this process, and as process 0 all others: whatever the main thread waits for will not come."""
        with self._ending:
            if self._closing.is_set():
                return
            self._closing.set()
        if not self._me.index:
            self._send("end", code=code, message=message)
            time.sleep(_GRACE_SECONDS)  # clients of a coordinator that vanishes abort before they have read why
        remedy = "; checkpoints are intact: start all processes again" if code == EXIT_LOST else ""
        print(f"error: {message}{remedy}", file=sys.stderr, flush=True)
        self._leave(code)
