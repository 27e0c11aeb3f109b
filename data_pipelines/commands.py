"""How every command starts, shows progress and ends: flags, progress bars, one-line errors, exit codes."""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import tqdm
from absl import app, flags, logging

from data_pipelines.errors import OF_THE_MACHINE, InputError

T = TypeVar("T")
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_PREEMPTED = 75  # asked to leave, saved: launchers start the same command again
EXIT_LOST = 76  # another process of the job is missing or died: launchers start all of them again

_PLAIN_INTERVAL_SECONDS = 15.0  # between progress lines where there is no terminal
# C0 and C1 controls, marks that turn the direction of writing, line separators: what a terminal or editor obeys; and
# the surrogates that stand for undecodable bytes of a file name.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from a file or its name, safe to show: control characters as `\\x1b` or `\\u202e`, stray bytes `\\xe9`."""

    def escape(found: re.Match) -> str:
        code = ord(found[0])
        code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _CONTROLS.sub(escape, text)


def csv_cell(value: Any) -> str:
    """The text of a CSV cell that spreadsheets show instead of computing it: `=1+1` becomes `'=1+1`."""
    text = printable(str(value))
    if isinstance(value, (int, float)):
        return text
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def flags_only(argv: Sequence[str]) -> None:
    """InputError for a command line with more than flags; `argv` is what is left of it after them."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")


def progress_bar(description: str, total: int, unit: str, done: int = 0, active: bool = True) -> tqdm.tqdm:
    """A progress line with rate and time left: live on a terminal, one line every 15 s elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        desc=description,
        initial=done,
        total=total,
        unit=unit,
        disable=not active,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else _PLAIN_INTERVAL_SECONDS,
        maxinterval=_PLAIN_INTERVAL_SECONDS,
    )


def _interrupt_again(otherwise: Callable[[Any], object], ignored: Any) -> None:
    """For exceptions that Python ignores, such as Ctrl-C in a callback of the garbage collector: JAX has one."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))  # here it would be ignored too
        again.daemon = True
        again.start()
    else:
        otherwise(ignored)


def _leave_at_once() -> NoReturn:
    """Ends an interrupted process without Python's own goodbye, during which threads that still compute may crash."""
    print("interrupted", file=sys.stderr)
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it is gone too
            stream.flush()
    os._exit(EXIT_INTERRUPTED)


def run_command(main: Callable[[Sequence[str]], int | None], define_flags: Callable[[], None] | None = None) -> None:
    """Parses absl flags, runs `main` and exits the process.

    Args:
      main: takes what is left after flag parsing (program name first) and returns an exit code or None.
      define_flags: called first. Config flags read their overrides as they are defined: mistakes there end in one line
        too.

    Exit codes: 0 or what `main` returns; 1 an unexpected error, with its traceback; 2 (or the error's own `exit_code`)
    an `InputError`, printed as one line; 2 unusable flags or config, or a machine without room; 130 interrupted.

    SIGQUIT (Ctrl-\\, or kill -QUIT) prints what every thread is doing, of a process that seems to hang.
    """
    faulthandler.register(signal.SIGQUIT, file=2)
    previous = sys.unraisablehook
    sys.unraisablehook = functools.partial(_interrupt_again, previous)

    def told(step: Callable[[], T]) -> T:
        try:
            return step()
        except Exception as error:  # config files are code: whatever they raise is the user's to mend
            lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines() if line.strip()]
            last = lines[-1] if lines else type(error).__name__
            last = re.sub(r"^flag (--\w+)=None: .*", r"\1 is missing: --help says what it is", last)
            print(f"error: {printable(last)}", file=sys.stderr)
            raise SystemExit(InputError.exit_code) from None

    def guarded(args: Sequence[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries report their routine at INFO
        try:
            return main(args)
        except InputError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return error.exit_code
        except OSError as error:
            if error.errno not in OF_THE_MACHINE and "No usable temporary directory" not in str(error):
                raise
            print(f"error: {printable(str(error))}; mend that and start again", file=sys.stderr)
            return InputError.exit_code
        except KeyboardInterrupt:
            _leave_at_once()

    if define_flags is not None:
        before = set(flags.FLAGS)
        told(define_flags)
        for name in set(flags.FLAGS) - before:  # listed by --help, whichever module defines them
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    try:
        app.run(guarded, flags_parser=lambda arguments: told(lambda: flags.FLAGS(arguments)))
    finally:
        sys.unraisablehook = previous
