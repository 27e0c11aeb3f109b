"""Stop requests, from signals and preemption notices. The loop agrees on them between hosts, saves and ends."""

import signal
import threading
import urllib.request
from typing import Any

from absl import logging

from data_pipelines.commands import EXIT_INTERRUPTED, EXIT_PREEMPTED

_RETRY_SECONDS = 5.0
_POLL_SECONDS = 1.0  # between answers of a URL that does not wait for a change itself
_TIMEOUT_SECONDS = 120.0


class StopRequest:
    """SIGTERM, SIGINT or a preemption notice ask the loop to save and end; a second SIGINT ends the process at once.

    Attributes:
      code: 0 without a request; then the exit code to end with, EXIT_PREEMPTED or EXIT_INTERRUPTED.
      looping: set by the loop when it begins. Until then SIGINT ends the process at once, as there is nothing to save;
        SIGTERM is remembered (in a job of several processes JAX's own handler would swallow it).
    """

    def __init__(self, notice_url: str = ""):
        """Watches, from `__enter__` to `__exit__`, for signals and, if given, for TRUE at `notice_url`.

        The URL is read as Google's metadata server wants it (…/instance/preempted?wait_for_change=true): plain HTTP
        with the header `Metadata-Flavor: Google`.
        """
        self.code, self.looping = 0, False
        self._url = notice_url
        self._previous: dict[int, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        if self._url:
            threading.Thread(target=self._listen, name="preemption notice", daemon=True).start()
        return self

    def __exit__(self, *unused) -> None:
        self._ended.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and (self.code == EXIT_INTERRUPTED or not self.looping):
            raise KeyboardInterrupt
        self.code = EXIT_INTERRUPTED if number == signal.SIGINT else self.code or EXIT_PREEMPTED

    def _listen(self) -> None:
        request = urllib.request.Request(self._url, headers={"Metadata-Flavor": "Google"})
        warned = False
        while not self._ended.is_set():
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                    if answer.read(64).strip().upper() == b"TRUE":
                        self.code = self.code or EXIT_PREEMPTED
                        return
                self._ended.wait(_POLL_SECONDS)
            except (OSError, ValueError) as error:
                if not warned and not isinstance(error, TimeoutError):
                    logging.warning("distributed.notice_url=%s cannot be read (%s); trying again", self._url, error)
                    warned = True
                self._ended.wait(_RETRY_SECONDS)
