"""How the processes of one job watch each other: who is missing at the start, who died, who hangs.

Process 0 listens beside the coordinator; the others connect to it and stay connected. Messages, see `channel` for who
is heard at all:

    knock, open  the ends prove to each other that they know the job's secret; before, neither says anything
    hello        to process 0: index; name of the process and the facts that all must agree on
    welcome      from process 0, when all have arrived and agree: its name
    progress     every few seconds, both ways: the step and what the process is doing
    end          exit code and message: to process 0, that a process failed; from it, that everybody ends now
    bye          a process ends in order

JAX itself ends a process by an abort that names nobody, also when not all arrive. Here the others end within a second,
and say which process it was.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from absl import logging

from data_pipelines.commands import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED
from data_pipelines.errors import InputError
from infmae_jax.training.config import DistributedConfig
from infmae_jax.training.hosts.channel import SECRET_VARIABLE, Line, Refused, job_secret

PULSE_SECONDS = 2.0
GREETING_SECONDS = 10.0  # in which a connection must have said who it is
LOOPING = "training"  # the activity in which a step is expected every now and then
_MOST_GREETINGS = 256  # at the same time
_CONNECT_PAUSE = 0.2
_ACCEPT_SECONDS = 0.2  # after which process 0 looks again who has arrived, or died
_GRACE_SECONDS = 2.0  # for messages on their way before a process ends
_LONGEST_MESSAGE = 3000
_CODES = (1, 2, 3, EXIT_PREEMPTED, EXIT_LOST, EXIT_INTERRUPTED)  # without 0: nobody ends a job as "done"


class ProcessesMissing(InputError):
    """Not all processes of the job arrived in time."""

    exit_code = EXIT_LOST


@dataclasses.dataclass
class Member:
    """What is known of a process: where it runs, and what it said last."""

    index: int
    name: str = f"{socket.gethostname()}, pid {os.getpid()}"
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    line: Line | None = None  # none to this process itself
    step: int = 0
    activity: str = "starting"
    since: float = dataclasses.field(default_factory=time.monotonic)  # when its step or activity last changed
    gone: bool = False

    def __str__(self) -> str:
        return f"process {self.index} ({self.name})"

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
    config: DistributedConfig,
    leave: Callable[[int], None] = os._exit,
) -> "Peers":
    """Waits until all processes of the job are there and agree.

    Args:
      address: host and port at which process 0 listens.
      index, count: this process, and how many there are.
      facts: what must be the same on all processes, by name.
      config: for its limits in seconds.
      leave: ends this process with an exit code, from any thread.

    Raises:
      ProcessesMissing: after `config.timeout_seconds`, with the names of those that are missing.
      InputError: the facts differ (names the fact and the processes), or this process has no usable secret.
    """
    me, secret = Member(index, facts=facts), job_secret()
    if index:
        return Peers(me, [_join(address, me, secret, config.timeout_seconds)], config, leave)
    try:
        listener = socket.create_server((bind_host(address[0]), address[1]), family=socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"port {address[1]} of this machine cannot be opened ({error.strerror}); choose another "
            "distributed.coordinator port (it and the one below must be free)"
        ) from error
    gathering = _Gathering(me, count, secret)
    with listener:
        gathering.wait(listener, config.timeout_seconds)
    return Peers(me, gathering.judge(address, config.timeout_seconds), config, leave)


def bind_host(host: str) -> str:
    """Where process 0 listens for a coordinator of this name: "" is everywhere."""
    return "127.0.0.1" if host == "localhost" or host.startswith("127.") else ""


class _Gathering:
    """Process 0 while the others arrive. Every connection has a thread of its own, and little time to say who it is."""

    def __init__(self, me: Member, count: int, secret: bytes):
        self._arrived, self._count, self._secret = {0: me}, count, secret
        self._admitting, self._over, self._refused = threading.Lock(), False, 0
        self._greetings = threading.BoundedSemaphore(_MOST_GREETINGS)

    @property
    def members(self) -> list[Member]:
        """Those that arrived and have not died since."""
        here = (self._arrived[index] for index in sorted(self._arrived))
        return [member for member in here if member.line is None or not member.line.closed()]

    def wait(self, listener: socket.socket, timeout: float) -> None:
        """Until all have arrived, or the timeout."""
        deadline = time.monotonic() + timeout
        listener.settimeout(_ACCEPT_SECONDS)
        while not self._over:
            try:
                connection, _ = listener.accept()
                if self._greetings.acquire(blocking=False):
                    threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
                else:
                    connection.close()
            except OSError:  # nobody comes, or too many connections just now
                time.sleep(0.01)
            with self._admitting:
                self._over = len(self.members) == self._count or time.monotonic() > deadline

    def _greet(self, connection: socket.socket) -> None:
        limit = time.monotonic() + GREETING_SECONDS
        try:
            line = Line(connection, self._secret, process_0=True, deadline=limit)
            line.receive(limit, "knock")
            line.send("open")
            _, index, text = line.receive(limit, "hello")
            name, facts = json.loads(text)
            self._admit(Member(index, str(name), dict(facts), line))
        except Exception as error:  # whatever a stranger sends ends its connection and nothing else
            connection.close()
            self._refused += isinstance(error, Refused)
        finally:
            self._greetings.release()

    def _admit(self, member: Member) -> None:
        with self._admitting:
            before = self._arrived.get(member.index)
            taken = any(before is other for other in self.members)  # one that died may be started again
            if self._over or taken or member.index >= self._count:
                begun = "the job has begun" if self._over else f"the job has {self._count} processes"
                reason = f"{before} is already here" if taken else begun
                text = f"{member} was turned away: {reason}; give each process its own distributed.process_id"
                member.line.send("end", EXIT_LOST, text)
                raise ConnectionAbortedError
            self._arrived[member.index] = member

    def judge(self, address: tuple[str, int], timeout: float) -> list[Member]:
        """Welcomes the others and returns them, or tells all why the job cannot begin and raises that."""
        problem: InputError | None = None
        members = self.members
        if missing := sorted(set(range(self._count)) - {member.index for member in members}):
            strangers = f" ({self._refused} connections without the job's secret were refused)" if self._refused else ""
            problem = ProcessesMissing(
                f"process {', '.join(map(str, missing))} of {self._count} did not arrive at {address[0]}:{address[1]} "
                f"within {timeout:g} s{strangers}; here are {', '.join(map(str, members))}: start the missing "
                "ones, or correct distributed.num_processes"
            )
        elif disagreement := _disagreement(members):
            problem = InputError(disagreement)
        for member in members[1:]:
            if problem is None:
                member.line.send("welcome", text=self._arrived[0].name)
            else:
                member.line.send("end", problem.exit_code, str(problem))
        if problem is not None:
            raise problem
        return members[1:]


def _join(address: tuple[str, int], me: Member, secret: bytes, timeout: float) -> Member:
    """Every other process: connects to process 0 and waits for its word."""
    where, deadline, warned = f"{address[0]}:{address[1]}", time.monotonic() + timeout, False
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
                logging.warning("%s turned this process away: %s, or is another program; trying again", where, reason)
                warned = True
            time.sleep(_CONNECT_PAUSE)
    line.send("hello", me.index, json.dumps([me.name, dict(me.facts)]))
    try:
        kind, code, text = line.receive(deadline + GREETING_SECONDS, "welcome", "end")
    except OSError:
        raise ProcessesMissing(
            f"process 0 at {where} went away before all processes had arrived; start all again"
        ) from None
    if kind == "end":
        raise (ProcessesMissing if code == EXIT_LOST else InputError)(text)
    return Member(0, text, line=line)


def _disagreement(members: Iterable[Member]) -> str:
    """One line on the first facts that differ from those of process 0; empty when all agree."""
    first, *others = members
    for other in others:
        theirs, ours = other.facts, first.facts
        if names := [n for n in sorted(theirs.keys() | ours.keys()) if theirs.get(n) != ours.get(n)]:
            values = "; ".join(f"{n} is {theirs.get(n)!r} there and {ours.get(n)!r} here" for n in names[:5])
            return f"{other} differs from {first}: {values}; start all with equal code, config and data"
    return ""


class Peers:
    """The other processes of a job; threads listen to them, and end this process when the job is lost."""

    def __init__(self, me: Member, others: list[Member], config: DistributedConfig, leave: Callable[[int], None]):
        self._me, self._others, self._leave = me, others, leave
        self._silence, self._stall = config.heartbeat_seconds, config.stall_seconds
        self._closing, self._ending = threading.Event(), threading.Lock()
        for member in others:
            threading.Thread(target=self._listen, args=(member,), name=str(member), daemon=True).start()
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
        if self._is_last_word():
            self._send("end", code, f"{self._me} failed: {message}")
            time.sleep(_GRACE_SECONDS)
        else:
            time.sleep(3 * _GRACE_SECONDS)  # another thread is ending this process

    def _is_last_word(self) -> bool:
        """Whether nothing has ended this process before; from now on, something has."""
        with self._ending:
            before = self._closing.is_set()
            self._closing.set()
            return not before

    def _send(self, kind: str, number: int = 0, text: str = "") -> None:
        for member in self._others:
            member.line.send(kind, number, text[:_LONGEST_MESSAGE])

    def _listen(self, member: Member) -> None:
        while not member.gone:
            try:
                kind, number, text = member.line.receive(time.monotonic() + self._silence, "progress", "end", "bye")
            except TimeoutError:
                lost = f"{member} has sent nothing for {self._silence:g} s, last at step {member.step}"
                return self._end(EXIT_LOST, lost)
            except OSError:
                return self._end(EXIT_LOST, f"{member} ended without a word while the job was {self._me.activity}")
            member.gone = kind != "progress"
            if kind == "progress":
                member.update(number, text)
            elif kind == "end":
                self._end(number if number in _CODES else EXIT_LOST, text)

    def _pulse(self) -> None:
        while not self._closing.is_set():
            self._send("progress", self._me.step, self._me.activity)
            self._find_stall()
            self._closing.wait(PULSE_SECONDS)

    def _find_stall(self) -> None:
        present = [self._me, *(member for member in self._others if not member.gone)]
        if self._me.index or not self._stall or any(time.monotonic() - m.since < self._stall for m in present):
            return
        behind = min(present, key=lambda m: (m.step, m.activity == LOOPING))
        states = ", ".join(f"process {m.index} {m.activity} at step {m.step}" for m in present)
        self._end(EXIT_LOST, f"no step for {self._stall:g} s, most likely because of {behind}: {states}")

    def _end(self, code: int, message: str) -> None:
        """Ends this process, and as process 0 all others: whatever the main thread waits for will not come."""
        if not self._is_last_word():
            return
        if not self._me.index:
            self._send("end", code, message)
            time.sleep(_GRACE_SECONDS)  # clients of a coordinator that vanishes abort before they have read why
        remedy = "; checkpoints are intact: start all processes again" if code == EXIT_LOST else ""
        print(f"error: {message[:_LONGEST_MESSAGE]}{remedy}", file=sys.stderr, flush=True)
        self._leave(code)
