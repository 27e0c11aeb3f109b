"""The command: a page and a summary, or one line about what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reporting.run_folders import make_eventful_run, parse

ROOT = Path(__file__).resolve().parents[1]


def run_command(*arguments):
    command = [sys.executable, "-m", "infmae_jax.report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command(tmp_path):
    eventful = make_eventful_run(tmp_path / "run")
    done = run_command(eventful, f"--output={tmp_path}/page.html")
    assert done.returncode == 0, done.stderr
    assert "status                    finished" in done.stdout and f"{tmp_path}/page.html" in done.stdout
    assert parse(tmp_path / "page.html").count("figure") == 8


@pytest.mark.parametrize("arguments, message", [((), "give one run folder"), (("nowhere",), "nowhere is not a run")])
def test_command_mistakes(arguments, message):
    done = run_command(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:") and message in line]
