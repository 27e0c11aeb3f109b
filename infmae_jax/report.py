"""Shows how a run went: one self-contained HTML page, and a summary on the terminal.

    python -m infmae_jax.report RUN [--output=FILE.html]

The page needs no network and no script: curves of everything that was logged with restarts, skipped updates,
roll-backs and damaged checkpoints marked, events with the records of skipped batches, pictures, config, and what
exactly ran. A run may be looked at while it trains.
"""

import base64
import html
import io
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from PIL import Image

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, local_path, writing
from data_pipelines.sheets import spread
from infmae_jax.pictures import MARKS, metric_curve, printable
from infmae_jax.reporting.history import RunHistory, duration_text
from infmae_jax.training.config import flat

NAME = "report.html"
_MEASURES = (
    ("images_per_second", "images per second", "{:.4g}"), ("goodput", "goodput", "{:.1%}"), ("mfu", "MFU", "{:.1%}"),
    ("device_memory_gib", "device memory", "{:.2f} GiB"),
)  # fmt: skip
_COUNTS = (
    ("skip", "updates skipped"), ("resume", "restarts"), ("rollback", "roll-backs"),
    ("checkpoint_damaged", "checkpoints damaged"), ("save_failed", "saves failed"), ("save", "checkpoints saved"),
)  # fmt: skip
_NOT_DRAWN = ("step", "time", "epoch")
_ROUTINE_EVENTS = ("save", "compile")
_NOT_DETAILS = ("time", "step", "event", "records")
_MAX_CURVES, _MAX_EVENTS, _MAX_RECORDS, _MAX_PICTURES = 60, 300, 20, 4
_PICTURE_WIDTH = 1600  # pixels
_MAX_PICTURE_BYTES = 64 << 20  # of a file that is opened at all

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}: {status}</title><style>
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 1300px; padding: 12px; color: #222 }}
img {{ max-width: 100%; height: auto }} figure {{ margin: 0 }} progress {{ width: 100% }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 12px }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse }} summary {{ cursor: pointer; font-weight: bold }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 14px 3px 0; border-bottom: 1px solid #ddd }}
td {{ overflow-wrap: anywhere; min-width: 4em }}
</style></head><body><h1>{name}</h1><p><b>{status}</b> {progress}</p>{bar}{body}
<p><small>infmae-jax, {now} UTC. One file; nothing is loaded from elsewhere.</small></p></body></html>
"""


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run folder, whatever it holds so far, and returns where: RUN/report.html by default.

    Raises:
      InputError: `run` is not a run folder, or the page cannot be written or does not end in .html.
    """
    history = RunHistory(run)
    path = Path(local_path(output or history.folder / NAME, "output"))
    if path.suffix.lower() != ".html":  # it may be a file of the run itself
        raise InputError(f"output {path} is no page: name a file that ends in .html")
    page = render(history)
    with writing(path), atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def write_report_if_possible(workdir: Path) -> None:
    """Whatever the end of a run, RUN/report.html shows how it came about."""
    try:
        write_report(workdir)
    except InputError as error:
        logging.warning("no report: %s", error)


def facts(history: RunHistory) -> list[tuple[str, str]]:
    """What to know of a run first, as pairs of label and value."""
    found, counts = [], history.counts
    if len(losses := history.finite("loss")):
        best = losses[losses[:, 1].argmin()]
        found += [("loss, last", _number(losses[-1, 1])), ("loss, first", _number(losses[0, 1]))]
        found += [("loss, best", f"{_number(best[1])} at step {_number(best[0])}")]
    recent = {key: history.recent(key) for key, *_ in _MEASURES}
    found += [(label, form.format(recent[key])) for key, label, form in _MEASURES if recent[key] is not None]
    if history.seen:
        found.append(("from first to last sign", duration_text(history.seen[1] - history.seen[0])))
    found += [(label, f"{counts[name]:,}") for name, label in _COUNTS if counts[name]]
    for key, label in (("parameters", "parameters"), ("gflop_per_image", "GFLOP per image"), ("devices", "devices")):
        value = history.record.get(key)
        found += [(label, _number(value) if isinstance(value, (int, float)) else str(value))] if value else []
    return found


def summary(history: RunHistory) -> str:
    """The facts as lines of text, safe for a terminal."""
    lines = [("status", " ".join(history.status).strip()), ("steps", _progress(history)), *facts(history)]
    lines += [("problem", problem) for problem in history.problems]
    return "\n".join(f"{label:<26}{printable(text)}" for label, text in lines)


def render(history: RunHistory) -> str:
    """The whole page. Everything that comes from a file is escaped."""
    status, total = history.status, history.total_steps
    body = [
        _table((), facts(history)),
        "".join(f"<p>Problem: {_text(problem)}.</p>" for problem in history.problems),
        _curves(history, [key for key in history.series if key not in _NOT_DRAWN]),
        _events(history),
        _pictures(history.pictures),
        _folded("Config", history.config),
        _folded("What exactly ran", history.record),
    ]
    return _PAGE.format(
        name=_text(history.folder.resolve().name), status=status[0],
        progress=_text(f"step {_progress(history)}. {status[1]}"),
        bar=f'<progress max="{total}" value="{min(history.step, total)}"></progress>' if total else "",
        body="".join(body), now=_moment(history.now),
    )  # fmt: skip


def _progress(history: RunHistory) -> str:
    return f"{history.step:,} of {history.total_steps:,}" if history.total_steps else f"{history.step:,}"


def _curves(history: RunHistory, keys: Sequence[str]) -> str:
    """A picture per metric that has a finite value; of counts only those that are not always zero."""
    marks = {name: [event["step"] for event in history.events if event["event"] == name] for name in MARKS}
    places = {name: np.unique(steps) for name, steps in marks.items()}
    steps = [row["step"] for row in history.rows[:1] + history.rows[-1:]] + [s for of in marks.values() for s in of]
    drawn = []
    for key in keys:
        known = history.finite(key)[:, 1]
        if len(drawn) == _MAX_CURVES or not known.any():
            continue
        picture = Image.fromarray(metric_curve(history.series[key], places, (min(steps), max(steps))))
        title = _text(f"{key.replace('_', ' ')}: {_number(known[-1])}")
        drawn.append(_figure(title, _data(picture, "PNG")))
    marked = [(*MARKS[name], len(of)) for name, of in marks.items() if of]
    legend = ", ".join(f'<span style="color:{colour}">{text} ({count})</span>' for text, colour, _, count in marked)
    return f'<h2>Curves</h2><p>{legend}</p><div class="curves">{"".join(drawn)}</div>' if drawn else ""


def _events(history: RunHistory) -> str:
    shown = [event for event in history.events if event["event"] not in _ROUTINE_EVENTS]
    rows = []
    for event in reversed(shown[-_MAX_EVENTS:]):
        details = flat({key: value for key, value in event.items() if key not in _NOT_DETAILS})
        details = _text(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in details.items()))
        if isinstance(records := event.get("records"), list) and records:
            names = "<br>".join(map(_text, records[:_MAX_RECORDS]))
            left = len(records) - _MAX_RECORDS
            more = f"<br>{left:,} more in events.jsonl" if left > 0 else ""
            details += f"<details><summary>{len(records):,} records</summary>{names}{more}</details>"
        rows.append((_moment(event["time"]), _number(event["step"]), event["event"].replace("_", " "), _Html(details)))
    cut = f"<p>The latest {_MAX_EVENTS} of {len(shown):,} events; all are in events.jsonl.</p>"
    cut = cut if len(shown) > len(rows) else ""
    return f"<h2>Events</h2>{cut}{_table(('time (UTC)', 'step', 'event', 'details'), rows)}" if rows else ""


def _pictures(paths: Sequence[Path]) -> str:
    """Of each kind of picture (names that differ in numbers alone) the last one and three earlier, evenly spaced."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(re.sub(r"\d+", "", path.name), []).append(path)
    drawn = []
    for alike in kinds.values():
        for path in reversed(spread(alike, _MAX_PICTURES)):
            try:
                if path.stat().st_size <= _MAX_PICTURE_BYTES:
                    with Image.open(path) as image:
                        image.thumbnail((_PICTURE_WIDTH, 4 * _PICTURE_WIDTH))
                        source = _data(image.convert("RGB"), "WEBP")
                    name = _text(re.sub(r"step_0*(\d+)", r"step \1", path.stem))
                    drawn.append(_figure(name, source))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue  # not a whole picture: it may be being written just now
    return f"<h2>Pictures</h2>{''.join(drawn)}" if drawn else ""


class _Html(str):
    """Text that is escaped already."""


def _text(value: Any) -> _Html:
    return value if isinstance(value, _Html) else _Html(html.escape(printable(value)))


def _folded(title: str, content: Mapping[str, Any]) -> str:
    text = "\n".join(map(_text, json.dumps(content, indent=1, ensure_ascii=False).splitlines()))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>" if content else ""


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>' if body else ""


def _figure(title: str, source: str) -> str:
    return f'<figure><figcaption>{title}</figcaption><img src="{source}" alt="{title}"></figure>'


def _data(image: Image.Image, form: str) -> str:
    """The picture inside the page."""
    image.save(out := io.BytesIO(), form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def _number(value: float) -> str:
    """A number for people: 1,234 or 0.01235 or 3.5e-07."""
    whole = math.isfinite(value) and value == int(value) and abs(value) < 1e15
    return f"{int(value):,}" if whole else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return _number(seconds)


def _define_flags() -> None:
    flags.DEFINE_string("output", None, f"Page to write, .html; by default RUN/{NAME}.")


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise InputError("give one run folder: python -m infmae_jax.report RUN [--output=FILE.html]")
    path = write_report(argv[1], flags.FLAGS.output)
    print(f"{summary(RunHistory(argv[1]))}\n{'page':<26}{path}")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
