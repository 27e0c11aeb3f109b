"""Authenticated lines between the processes of a job: whoever does not know the job's secret is neither heard nor told.

Both ends send a random greeting. The secret and both greetings make a key for this connection; every later line is
`MAC [KIND, NUMBER, TEXT]`, its MAC (HMAC-SHA256) over the sender, the line's place in the order and the rest. So
nothing can be forged, replayed, reordered or reflected. Lines are not encrypted: whoever reads the network reads them.
"""

import contextlib
import hmac
import json
import os
import re
import secrets
import select
import socket
import threading
import time

from data_pipelines.errors import InputError

SECRET_VARIABLE = "INFMAE_JOB_SECRET"
_SHORTEST_SECRET = 16
_LONGEST_LINE = 1 << 20
_LONGEST_GREETING = 64


class Refused(ConnectionError):
    """The other end does not know the job's secret, or sends what this project does not send."""


def job_secret() -> bytes:
    """The secret that all processes of a job share, the environment variable INFMAE_JOB_SECRET.

    Raises:
      InputError: it is missing or short.
    """
    secret = os.environ.get(SECRET_VARIABLE, "").encode()
    if len(secret) < _SHORTEST_SECRET:
        raise InputError(
            f"{SECRET_VARIABLE} must hold at least {_SHORTEST_SECRET} characters, the same in all processes; "
            "openssl rand -hex 32 makes some"
        )
    return secret


class Line:
    """One end of a connection between process 0 and another one."""

    def __init__(self, connection: socket.socket, secret: bytes, process_0: bool, deadline: float):
        """Exchanges greetings; process 0 and the other end must say which of the two they are.

        Raises:
          OSError: no greeting before the deadline (monotonic seconds).
        """
        self._socket, self._pending, self._lock = connection, b"", threading.Lock()
        self._sent = self._received = 0
        self._names = (b"0", b"1") if process_0 else (b"1", b"0")
        ours = secrets.token_hex(16).encode()
        connection.sendall(ours + b"\n")
        theirs = self._read(deadline, _LONGEST_GREETING)
        if not re.fullmatch(rb"[0-9a-f]{32}", theirs):
            raise Refused("this is no greeting")
        self._key = hmac.digest(secret, ours + theirs if process_0 else theirs + ours, "sha256")

    def send(self, kind: str, number: int = 0, text: str = "") -> None:
        """Sends a message; that the connection is closed is noticed by whoever reads."""
        line = json.dumps([kind, number, text]).encode()
        with self._lock, contextlib.suppress(OSError):
            self._sent += 1
            self._socket.sendall(self._mac(self._names[0], self._sent, line) + b" " + line + b"\n")

    def receive(self, deadline: float, *kinds: str) -> tuple[str, int, str]:
        """Kind, number (not negative) and text (printable) of the next message, which must be one of `kinds`.

        Raises:
          TimeoutError: none came before the deadline (monotonic seconds).
          ConnectionError: the connection has ended, or carried something else (`Refused`).
        """
        mac, _, line = self._read(deadline, _LONGEST_LINE).partition(b" ")
        self._received += 1
        if not hmac.compare_digest(mac, self._mac(self._names[1], self._received, line)):
            raise Refused("the other end does not know the job's secret")
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            kind, number, text = json.loads(line)
            if kind in kinds and type(number) is int and 0 <= number < 1 << 53 and isinstance(text, str):
                return kind, number, "".join(letter if letter.isprintable() else " " for letter in text)
        raise Refused("this is not a message of this version of the project")

    def closed(self) -> bool:
        """Whether the other end has gone; at once."""
        try:
            readable, _, _ = select.select([self._socket], [], [], 0)
            return bool(readable) and not self._socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        self._socket.close()

    def _mac(self, sender: bytes, number: int, text: bytes) -> bytes:
        return hmac.digest(self._key, b"%s %d %s" % (sender, number, text), "sha256").hex().encode()

    def _read(self, deadline: float, longest: int) -> bytes:
        """The next line, without its end."""
        while b"\n" not in self._pending:
            if len(self._pending) > longest:
                raise Refused("the line is too long")
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            if not (data := self._socket.recv(1 << 16)):
                raise ConnectionError("the connection has ended")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line
