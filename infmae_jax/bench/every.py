"""Subjects in order of worth within a time budget; what is known is on disk after each of them."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.files import atomic_write, writing
from infmae_jax.bench.results import report, text

# What a machine that is lent for minutes should answer first.
WORTH = ("forms", "profile", "step", "features", "data", "flops")
JSON_NAME, TABLES_NAME = "bench.json", "bench.txt"


def run_all(
    subjects: Mapping[str, Callable[[], dict[str, Any]]], minutes: float, folder: Path | None
) -> list[dict[str, Any]]:
    """Results of the subjects in the order of `WORTH`, the others behind; tables go to standard error.

    Args:
      subjects: name -> measures it. Of several, one that fails is a result with "failed" true and the error as its row.
      minutes: no subject begins later; one that has begun is finished. 0: no limit.
      folder: gets `bench.json` and `bench.txt`, written anew after every subject; None: nothing is written.
    """
    results: list[dict[str, Any]] = []
    start = time.perf_counter()
    for name in sorted(subjects, key=lambda name: WORTH.index(name) if name in WORTH else len(WORTH)):
        since = time.perf_counter()
        if minutes and since - start >= 60 * minutes:
            result = report(name, {}, [{"name": name, "note": f"not measured: {minutes:g} minutes were over"}])
        else:
            result = _measured(name, subjects[name]) if len(subjects) > 1 else subjects[name]()
        result["measuring_took_seconds"] = round(time.perf_counter() - since, 1)
        results.append(result)
        print(text(result), end="\n\n", file=sys.stderr, flush=True)
        if folder is not None:
            for file, content in (
                (JSON_NAME, json.dumps(results, indent=1)),
                (TABLES_NAME, "\n\n".join(map(text, results))),
            ):
                with writing(folder), atomic_write(folder / file) as partial:
                    partial.write_text(content + "\n")
    return results


def _measured(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # whatever it is, the machine's remaining minutes belong to the other subjects
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        note = f"failed: {type(error).__name__}: {lines[0][:300]}"
        return report(name, {}, [{"name": name, "note": note}]) | {"failed": True}
