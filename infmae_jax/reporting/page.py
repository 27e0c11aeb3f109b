"""The page: sections of HTML from a run's history. Everything that comes from a file is escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from infmae_jax.reporting import charts, style
from infmae_jax.reporting.charts import Curve, number_text
from infmae_jax.reporting.history import RunHistory, duration_text
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import flat, to_config
from infmae_jax.training.goodput import SHARES

_CURVES = {
    "loss": Curve("loss", noisy=True, log=True),
    "learning_rate": Curve("learning rate"),
    "grad_norm": Curve("gradient norm", noisy=True, log=True),
    "images_per_second": Curve("images a second", noisy=True),
    "goodput": Curve("goodput, share of wall time spent stepping"),
    "mfu": Curve("model FLOPs utilisation", noisy=True),
    "data_wait_seconds": Curve("seconds waited for data between logged steps", noisy=True),
    "device_memory_gib": Curve("device memory, GiB"),
    "host_memory_gib": Curve("host memory, GiB"),
    "skipped_updates": Curve("updates skipped", from_zero=True),
    "substituted_samples": Curve("damaged records replaced", from_zero=True),
}
_NOT_DRAWN = ("step", "time", "epoch")
_ROUTINE_EVENTS = ("save", "compile")
_MAX_EVENTS = 300  # rows of the table
_MAX_KEYS = 4000  # record keys on the page
_MAX_PICTURES = 4
_PICTURE_WIDTH = 1600  # pixels
_MAX_PICTURE_BYTES = 64 << 20  # of a file that is opened at all


def render(history: RunHistory, facts: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
      facts: label and value of each tile of the summary.
    """
    name = escape(history.folder.resolve().name)
    body = "".join([
        _header(history, name),
        _facts(facts),
        _problems(history.problems),
        _time_bar(history),
        _curves(history),
        _events(history),
        _pictures(history.pictures),
        _layers(history),
        _config(history.config),
        _record(history.record),
        f"<footer>infmae-jax, {_moment(history.now)}. One file, nothing is loaded from elsewhere.</footer>",
    ])  # fmt: skip
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style.CSS, style.SCRIPT))
    policy = "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*hashes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{name}: {escape(history.status.word)}</title><style>{style.CSS}</style></head>"
        f"<body><main>{body}</main><script>{style.SCRIPT}</script></body></html>\n"
    )


def _header(history: RunHistory, name: str) -> str:
    status = history.status
    done = f"step {history.step:,}"
    progress = ""
    if history.total_steps:
        done += f" of {history.total_steps:,}"
        progress = f'<progress max="{history.total_steps}" value="{min(history.step, history.total_steps)}"></progress>'
    left = f", about {duration_text(history.seconds_left)} left" if history.seconds_left else ""
    detail = f": {escape(status.detail)}" if status.detail else ""
    return (
        f'<header><h1>{name}</h1><p><span class="status {status.word}">{status.word}</span>'
        f" {done}{left}{detail}</p>{progress}</header>"
    )


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{tiles}</dl>'


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    return f'<ul class="problems">{"".join(f"<li>{escape(problem)}</li>" for problem in problems)}</ul>'


def _time_bar(history: RunHistory) -> str:
    """Where the wall time of the latest process that said so went."""
    shares = next((e["shares"] for e in reversed(history.events) if isinstance(e.get("shares"), Mapping)), None)
    if shares is None:
        return ""
    x, parts, names = 0.0, [], []
    for number, name in enumerate(SHARES):
        share = shares.get(name)
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            continue
        title = f"{name.replace('_', ' ')} {100 * share:.1f} %"
        place = f'x="{1000 * x:.1f}" width="{1000 * share:.1f}" height="24"'
        parts.append(f'<rect class="s{number}" {place}><title>{title}</title></rect>')
        names.append(f'<li><i class="s{number}"></i>{title}</li>')
        x += share
    return (
        '<section><h2>Where the time of the last process went</h2><svg class="bar" viewBox="0 0 1000 24" '
        f'preserveAspectRatio="none" role="img" aria-label="shares of wall time">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(names)}</ul></section>'
    )


def _curves(history: RunHistory) -> str:
    if not history.rows:
        return ""
    others = [key for key in history.keys("") if "/" not in key and key not in (*_CURVES, *_NOT_DRAWN)]
    marks = charts.marks_of(history.events)
    first, last = history.rows[0]["step"], history.rows[-1]["step"]
    shown = (float(min([first, *(m.step for m in marks)])), float(max([last, first + 1, *(m.step for m in marks)])))
    drawn = []
    for key, curve in {**_CURVES, **{key: Curve(key.replace("_", " ")) for key in others}}.items():
        steps, values = history.series(key)
        if values.any() or not curve.from_zero:  # a count that stays zero is no news
            drawn.append(charts.line_chart(curve, steps, values, marks, shown))
    legend = "".join(
        f'<li><svg viewBox="-7 -7 14 14" class="mark {kind.css}"><path d="{kind.shape}"/></svg>'
        f"{kind.title} ({sum(m.kind == name for m in marks)})</li>"
        for name, kind in charts.MARKS.items()
        if any(m.kind == name for m in marks)
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'<section><h2>Curves</h2>{legend}<div class="charts">{"".join(drawn)}</div></section>'


def _events(history: RunHistory) -> str:
    if not history.events:
        return ""
    told = zip(history.events, charts.mark_kinds(history.events))
    shown = [(event, kind) for event, kind in told if event["event"] not in _ROUTINE_EVENTS]
    notes = _saves(history.events)
    if len(shown) > _MAX_EVENTS:
        notes.append(f"These are the latest {_MAX_EVENTS} of {len(shown):,} events; all are in events.jsonl.")
    rows, keys_left = [], _MAX_KEYS
    for event, kind in reversed(shown[-_MAX_EVENTS:]):
        details, keys_left = _event_details(event, keys_left)
        rows.append(
            f'<tr class="{kind or "plain"}"><td>{_moment(event["time"])}</td><td>{int(event["step"]):,}</td>'
            f"<td>{escape(event['event'].replace('_', ' '))}</td><td>{details}</td></tr>"
        )
    return (
        f"<section><h2>Events</h2>{''.join(f'<p>{escape(note)}</p>' for note in notes)}"
        '<div class="wide tall"><table class="events"><thead><tr><th>time (UTC)</th><th>step</th><th>event</th>'
        f"<th>details</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _saves(events: Sequence[Mapping[str, Any]]) -> list[str]:
    saves = [event for event in events if event["event"] == "save"]
    if not saves:
        return []
    note = f"{len(saves):,} checkpoints saved, the last at step {int(saves[-1]['step']):,}"
    blocked = [e["seconds_blocked"] for e in saves if isinstance(e.get("seconds_blocked"), (int, float))]
    if blocked:
        note += f"; a save kept the loop waiting for {statistics.median(blocked):.2f} s (median)"
    return [f"{note}."]


def _event_details(event: Mapping[str, Any], keys_left: int) -> tuple[str, int]:
    """What the event says besides time, step and name; `keys_left` record keys may still be shown."""
    told, records = [], event.get("records")
    for key, value in event.items():
        if key in ("time", "step", "event", "records", "shares", "last_row_time") or value is None:
            continue
        text = number_text(value) if isinstance(value, float) else str(value)
        told.append(f"{escape('exit code' if key == 'code' else key.replace('_', ' '))} {escape(text)}")
    html = ", ".join(told)
    if isinstance(records, list) and records:
        names = [escape(str(key)) for key in records[:keys_left]]
        rest = len(records) - len(names)
        more = f"<br>{rest:,} more in events.jsonl" if rest else ""
        html += f"<details><summary>{len(records):,} records</summary><code>{'<br>'.join(names)}</code>{more}</details>"
        keys_left -= len(names)
    return html, keys_left


def _pictures(paths: Sequence[Path]) -> str:
    """The last reconstructions open, earlier ones (evenly spaced) folded."""
    last = len(paths) - 1
    places = sorted({round(i * last / (_MAX_PICTURES - 1)) for i in range(_MAX_PICTURES)}) if paths else []
    drawn = []
    for path in reversed([paths[place] for place in places]):
        source = _data_uri(path)
        if source is None:
            continue
        step = path.stem.split("_")[1].lstrip("0") or "0"
        name = escape(f"before step {step}")
        drawn.append(
            f"<details{'' if drawn else ' open'}><summary>{name}</summary>"
            f'<div class="wide"><img src="{source}" alt="reconstructions {name}"></div></details>'
        )
    return f"<section><h2>Reconstructions</h2>{''.join(drawn)}</section>" if drawn else ""


def _data_uri(path: Path) -> str | None:
    """The picture as a smaller one inside the page; None for a file that is no whole picture."""
    try:
        if path.stat().st_size > _MAX_PICTURE_BYTES:
            return None
        with Image.open(path) as image:
            image.thumbnail((_PICTURE_WIDTH, 4 * _PICTURE_WIDTH))
            out = io.BytesIO()
            image.convert("RGB").save(out, "WEBP", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _layers(history: RunHistory) -> str:
    """Norms of every layer, the first and the last that were logged."""
    rows = []
    for key in history.keys("param_norm/"):
        layer = key.removeprefix("param_norm/")
        norms, grads = history.finite(key), history.finite(f"grad_norm/{layer}")
        cells = [*(norms[[0, -1]] if len(norms) else ()), *grads[-1:]]
        rows.append([layer, *(number_text(float(f"{value:.3g}")) for value in cells)])
    if not rows:
        return ""
    heads = ("layer", "parameter norm, first", "last", "gradient norm, last")
    return _folded("Layers", _table(heads, rows))


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    defaults = flat(json.loads(json.dumps(to_config(PretrainConfig()).to_dict())))  # lists for tuples, as in the file
    rows = [(key, value, defaults.get(key, "")) for key, value in flat(config).items()]
    changed = [row for row in rows if row[0] in defaults and row[1] != row[2]]
    heads = ("key", "value", "default")
    everything = _table(heads, rows, highlighted=changed)
    return (
        f"<section><h2>Config</h2><p>{len(changed)} keys differ from the defaults.</p>{_table(heads, changed)}"
        f"<details><summary>all {len(rows)} keys</summary>{everything}</details></section>"
    )


def _record(record: Mapping[str, Any]) -> str:
    """What exactly ran: everything of run_info.json, its parameter table folded."""
    if not record:
        return ""
    table = record.get("parameter_table")
    tables = [_table(("", ""), flat({k: v for k, v in record.items() if k != "parameter_table"}).items())]
    if isinstance(table, list) and all(isinstance(row, Mapping) for row in table):
        heads = ("name", "shape", "sharding")
        cells = _table(heads, [[str(row.get(head, "")) for head in heads] for row in table])
        tables.append(f"<details><summary>{len(table)} parameters</summary>{cells}</details>")
    return _folded("What exactly ran", "".join(tables))


def _folded(title: str, content: str) -> str:
    return f"<section><details><summary><h2>{escape(title)}</h2></summary>{content}</details></section>"


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], highlighted: Sequence[Sequence[str]] = ()) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f'<tr class="{"changed" if row in highlighted else "plain"}">'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return number_text(seconds)
