"""Requests to stop: signals to this very process, and a preemption notice from a local metadata server."""

import http.server
import os
import signal
import threading
import time

import pytest

from data_pipelines.commands import EXIT_INTERRUPTED, EXIT_PREEMPTED
from infmae_jax.training.hosts.stop import StopRequest


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_signals_ask_and_are_given_back(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.code == 0
        stop.looping = True
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.code == code)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once_but_not_a_second_sigterm():
    with StopRequest() as stop:
        stop.looping = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.code == EXIT_PREEMPTED)
        os.kill(os.getpid(), signal.SIGINT)  # the first: a person overrules the platform
        wait_until(lambda: stop.code == EXIT_INTERRUPTED)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_before_the_loop_ctrl_c_ends_at_once_and_sigterm_is_remembered():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.code == EXIT_PREEMPTED)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


@pytest.fixture
def metadata_server():
    """Answers like Google's: FALSE until `server.preempted`, and nothing without the header."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            fine = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if fine else 403)
            self.end_headers()
            self.wfile.write(b"TRUE" if self.server.preempted and fine else b"FALSE")

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.preempted, server.asked = False, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_preemption_notice_is_a_request(metadata_server):
    url = f"http://127.0.0.1:{metadata_server.server_address[1]}/instance/preempted?wait_for_change=true"
    with StopRequest(url) as stop:
        wait_until(lambda: metadata_server.asked)
        assert metadata_server.asked[0] == "/instance/preempted?wait_for_change=true" and stop.code == 0
        metadata_server.preempted = True
        wait_until(lambda: stop.code == EXIT_PREEMPTED)


def test_a_notice_url_that_does_not_answer_is_no_request():
    with StopRequest("http://127.0.0.1:9/") as stop:
        time.sleep(0.2)
        assert stop.code == 0
