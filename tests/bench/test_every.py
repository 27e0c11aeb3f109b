"""All subjects: the order, the budget, a subject that fails, what is on disk after each."""

import json
import time

from infmae_jax.bench import every
from infmae_jax.bench.results import report


def test_order_failures_and_files(tmp_path, capsys):
    ran = []

    def subject(name):
        def measure():
            ran.append(name)
            before = json.loads((tmp_path / every.JSON_NAME).read_text()) if len(ran) > 1 else []
            assert [result["subject"] for result in before] == ran[:-1]  # written after each, not at the end
            if name == "profile":
                raise ArithmeticError("two ways compute\nsomething else")
            return report(name, {}, [{"name": name, "ms": 1.0}])

        return measure

    results = every.run_all({name: subject(name) for name in ("flops", "profile", "forms", "new")}, 0, tmp_path)
    assert ran == ["forms", "profile", "flops", "new"] == [result["subject"] for result in results]
    failed = results[1]
    assert failed["failed"] and failed["rows"][0]["note"] == "failed: ArithmeticError: two ways compute"
    assert not any(result.get("failed") for result in results if result is not failed)
    assert json.loads((tmp_path / every.JSON_NAME).read_text()) == results
    tables = (tmp_path / every.TABLES_NAME).read_text()
    assert all(f"{name} on " in tables for name in ran) and "two ways compute" in tables
    assert not list(tmp_path.glob("*.part"))


def test_no_subject_begins_after_the_budget(monkeypatch):
    clock = iter([0.0, 0.0, 59.0, 59.5, 60.0, 60.1, 60.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: report(name, {}, [{"name": name}]) for name in ("forms", "profile", "step")}
    forms, profile, step = every.run_all(calls, 1.0, None)
    assert "note" not in forms["rows"][0] and "note" not in profile["rows"][0]
    assert step["rows"][0]["note"] == "not measured: 1 minutes were over" and not step.get("failed")
