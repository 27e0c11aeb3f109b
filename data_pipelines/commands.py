"""How every command of the project starts and ends: flags, one-line errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app

from data_pipelines.errors import InputError

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses absl flags, runs `main` and exits the process.

    Args:
      main: takes the positional arguments left after flag parsing (program name first) and returns an exit code or None.
      argv: command line, by default `sys.argv`.

    Exit codes: 0 or what `main` returns; 1 unusable flags (absl prints the usage) or an unexpected error (with its
    traceback); 2 an `InputError`, printed as one line; 130 interrupted.
    """

    def guarded(args: Sequence[str]) -> int | None:
        try:
            return main(args)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_INPUT_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    app.run(guarded, argv=list(argv) if argv is not None else None)
