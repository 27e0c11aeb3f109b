"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """A mistake in what the user gave: a path, a flag, a config key, a file.

    The message is one line that names the thing and the remedy. Commands print it without a traceback and exit with
    `exit_code` (see `data_pipelines.commands.run_command`).
    """

    exit_code = 2
