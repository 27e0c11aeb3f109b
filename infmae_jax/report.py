"""Shows how a run went: one self-contained HTML page, and a summary on the terminal.

    python -m infmae_jax.report RUN [--output=FILE.html]

The page needs no network: curves with restarts, skipped updates, rollbacks and damaged checkpoints marked, events with
the records of skipped batches, reconstructions, config, and what exactly ran. A run may be looked at while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from infmae_jax.reporting import page
from infmae_jax.reporting.charts import number_text
from infmae_jax.reporting.history import RunHistory, duration_text, read_history

NAME = "report.html"


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run folder, whatever it holds so far, and returns where: RUN/report.html by default.

    Raises:
      InputError: `run` is no run folder, or the page cannot be written.
    """
    return _write(read_history(run), output)


def _write(history: RunHistory, output: str | Path | None) -> Path:
    path = Path(output) if output else history.folder / NAME
    temporary = path.with_name(f".{path.name}.partial")
    html = page.render(history, facts(history)).encode(errors="replace")  # names of files may hold what is no text
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(html)
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror or error}): name another --output") from error
    return path


def facts(history: RunHistory) -> list[tuple[str, str]]:
    """What to know of a run first, as pairs of label and value."""
    steps, losses = history.series("loss")
    found = []
    known = np.flatnonzero(np.isfinite(losses))
    if len(known):
        best = known[np.argmin(losses[known])]
        found += [
            ("loss, last", number_text(float(losses[known[-1]]))),
            ("loss, first", number_text(float(losses[known[0]]))),
            ("loss, best", f"{number_text(float(losses[best]))} at step {int(steps[best]):,}"),
        ]
    return [*found, *_rates(history), *_accidents(history), *_what_ran(history)]


def _rates(history: RunHistory) -> list[tuple[str, str]]:
    found = []
    if rate := history.recent("images_per_second"):
        found.append(("images a second", number_text(float(f"{rate:.4g}"))))
    goodput = history.finite("goodput")
    if len(goodput):
        found.append(("goodput, last process", f"{100 * goodput[-1]:.1f} %"))
    if history.rows:
        utilisation = history.recent("mfu")
        found.append(("MFU", f"{100 * utilisation:.1f} %" if utilisation is not None else "not known for this device"))
    for key, name in (("device_memory_gib", "device memory, most"), ("host_memory_gib", "host memory, most")):
        values = history.finite(key)
        if len(values):
            found.append((name, f"{values.max():.2f} GiB"))
    if history.began is not None and history.last_sign is not None:
        found.append(("from first to last sign", duration_text(history.last_sign - history.began)))
    return found


def _accidents(history: RunHistory) -> list[tuple[str, str]]:
    lost, counts = history.lost, history.counts
    found = [("updates skipped", f"{history.skipped:,}"), ("restarts", f"{lost.restarts:,}")]
    if lost.restarts or lost.rollbacks:
        found += [("work made again", duration_text(lost.redone_seconds)), ("down", duration_text(lost.down_seconds))]
    for name, label in (
        ("rollback", "rollbacks"),
        ("checkpoint_damaged", "checkpoints damaged"),
        ("save_failed", "saves failed"),
    ):
        if counts[name]:
            found.append((label, f"{counts[name]:,}"))
    replaced = history.finite("substituted_samples")
    if replaced.max(initial=0):
        found.append(("damaged records replaced", f"{int(replaced.max()):,}"))
    return found


def _what_ran(history: RunHistory) -> list[tuple[str, str]]:
    record, found = history.record, []
    for key, label in (("parameters", "parameters"), ("gflop_per_image", "GFLOP an image")):
        if isinstance(record.get(key), (int, float)):
            found.append((label, number_text(float(record[key]))))
    if "devices" in record:
        found.append(("devices", str(record["devices"])))
    if isinstance(record.get("mesh"), dict):
        found.append(("mesh", " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items())))
    return found


def summary(history: RunHistory) -> str:
    """The facts as lines of text."""
    status = history.status
    total = f" of {history.total_steps:,}" if history.total_steps else ""
    lines = [("status", " ".join(filter(None, (status.word, status.detail)))), ("steps", f"{history.step:,}{total}")]
    lines += facts(history) + [("problem", problem) for problem in history.problems]
    return "\n".join(f"{label:<26}{value}" for label, value in lines)


def _define_flags() -> None:
    flags.DEFINE_string("output", None, f"Page to write, .html; by default RUN/{NAME}.")


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise InputError("give one run folder: python -m infmae_jax.report RUN [--output=FILE.html]")
    history = read_history(argv[1])
    path = _write(history, flags.FLAGS.output)
    print(f"{summary(history)}\n{'page':<26}{path}")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
