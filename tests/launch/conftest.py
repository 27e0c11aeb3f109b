"""A copy of launch/ in a checkout of its own, and stubs on PATH for every command that would reach a cluster."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SECRET = "0123456789abcdef" * 4

# Words of a call end in a zero byte, calls in a one. What arrives on standard input counts as one more word.
RECORDING = r"""#!/usr/bin/env bash
{
  printf '%s\0' "$(basename "$0")" "$@"
  if [[ " $* " == *" --filename=- "* ]]; then printf '<%s\0' "$(cat)"; fi
  printf '\1'
} >>"$CALLS"
"""


class Checkout:
    """A checkout that holds launch/ only, with stubs.

    Attributes:
      root: the checkout.
      python: its environment's Python, a stub too.
      environment: what its scripts see; change it freely.
    """

    def __init__(self, folder: Path):
        self.root = folder / "checkout"
        self._bin, self._calls = folder / "bin", folder / "calls"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        self._bin.mkdir()
        self._calls.touch()
        self.environment = {
            "PATH": f"{self._bin}:{os.environ['PATH']}", "HOME": str(folder), "CALLS": str(self._calls),
            "INFMAE_JOB_SECRET": SECRET,
        }  # fmt: skip
        self.python = self.root / ".venv" / "bin" / "python"
        self.stub("python", path=self.python)
        self.stub("install.sh", path=self.root / "launch" / "install.sh")

    def stub(self, name: str, body: str = "", path: Path | None = None) -> None:
        """Puts a command in place that records its call and then does what the bash code `body` says."""
        path = path or self._bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f"{RECORDING}{body}\n")
        path.chmod(0o755)

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        """Runs it in the checkout, with the stubs first on PATH."""
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=60, **options
        )

    def start(self, *command: str) -> subprocess.Popen:
        """Starts it likewise, in a process group of its own."""
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def take_calls(self) -> list[list[str]]:
        """The calls since the last time, each a list of words."""
        calls = [call.split("\0")[:-1] for call in self._calls.read_text().split("\1")[:-1]]
        self._calls.write_text("")
        return calls


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def words_of(script: str) -> list[list[str]]:
    """The commands of a script without here-documents, as lists of words."""
    return [shlex.split(line) for line in script.splitlines() if line and not line.startswith("#")]


def check_dry_run(checkout: Checkout, script: str, *options: str) -> list[list[str]]:
    """--dry-run calls nothing; run as a script, what it prints makes the very calls that the real thing makes.

    Returns:
      those calls.
    """
    dry = checkout.run(script, "--dry-run", *options)
    assert dry.returncode == 0, dry.stderr
    assert checkout.take_calls() == []
    printed = checkout.run("bash", "-euo", "pipefail", "-c", dry.stdout)
    assert printed.returncode == 0, printed.stderr
    expected = checkout.take_calls()
    real = checkout.run(script, *options)
    assert real.returncode == 0, real.stderr
    calls = checkout.take_calls()
    assert calls == expected and calls
    return calls
