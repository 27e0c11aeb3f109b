"""How every measurement is reported: one dict for JSON, and its rows as a table for people."""

import sys
from typing import Any

import jax

from infmae_jax.training.run_folder import package_versions

Row = dict[str, Any]


def report(subject: str, settings: dict[str, Any], rows: list[Row], notes: list[str] | None = None) -> dict[str, Any]:
    """A measurement with what it was made on: subject, device, versions, settings, rows, notes."""
    devices = jax.devices()
    if torch_model := sys.modules.get("infmae_jax.bench.torch_model"):  # imported where PyTorch is compared with
        settings = settings | torch_model.settings()
    return {
        "subject": subject,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "versions": package_versions(),
        "settings": settings,
        "rows": rows,
        "notes": notes or [],
    }


def on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def text(result: dict[str, Any]) -> str:
    """The report for people: a headline, the rows as an aligned table, the notes."""
    settings = ", ".join(f"{key}={value}" for key, value in result["settings"].items())
    head = f"{result['subject']} on {result['device']}, jax {result['versions']['jax']}: {settings}"
    return "\n".join([head, table(result["rows"]), *result["notes"]])


def table(rows: list[Row]) -> str:
    """Rows as aligned text; the columns are all keys in the order in which they appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
