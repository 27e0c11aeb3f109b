"""The one exception that means: the user can mend this."""

import contextlib
import errno
from collections.abc import Iterator

# Of an OSError: what the machine lacks (room, open files, a sound disk), which is no fault of the file at hand.
OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM
)  # fmt: skip
_LONGEST = 1500  # characters of a message


class InputError(ValueError):
    """A mistake in what the user gave: a path, a flag, a config key, a file.

    The message is one line that names the thing and the remedy; the middle of a very long one is left out. Commands
    print it without a traceback and exit with `exit_code` (see `data_pipelines.commands.run_command`).
    """

    exit_code = 2

    def __init__(self, message: str = ""):
        half = _LONGEST // 2
        super().__init__(message if len(message) <= _LONGEST else f"{message[:half]}…{message[-half:]}")


@contextlib.contextmanager
def refusing(what: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """InputError "WHAT (reason): REMEDY" where the block raises one of these kinds; an InputError passes as it is."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = "brackets within brackets" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"{what} ({reason}): {remedy}") from error
