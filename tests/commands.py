"""Commands as their users run them, inside the test's own process: flags, output, one-line errors, exit codes."""

import contextlib
import importlib
import io
import sys
from types import SimpleNamespace

from absl import flags

from data_pipelines.commands import run_command


def run(module, *arguments):
    """What a command prints and its exit code (returncode, stdout, stderr); other exceptions are those of the test."""
    module = importlib.import_module(module)
    before, argv = set(flags.FLAGS), sys.argv
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [module.__name__, *map(str, arguments)]  # where ml_collections finds overrides of a config
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(module.main, module._define_flags)
        code = 0
    except SystemExit as done:
        code = done.code or 0
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
