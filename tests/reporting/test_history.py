"""What became of a run, by its folder."""

import pytest

from infmae_jax.reporting.history import RunHistory
from tests.reporting.run_folders import NOW, event, make_run, metrics_row


@pytest.fixture(autouse=True)
def read_now(monkeypatch):
    """Runs are dated from the start of the tests, which may be half an hour ago by now."""
    monkeypatch.setattr("infmae_jax.reporting.history.time.time", lambda: NOW)


@pytest.mark.parametrize(
    "events, age, word, detail",
    [
        ([event(-90, "start", 0)], 60, "running", "ago"),
        ([event(-90, "start", 0)], 7200, "silent", "h: killed, or it hangs"),
        ([event(-90, "start", 0), event(-50, "preempted", 9, code=75)], 60, "preempted", "at step 9"),
        ([event(-90, "start", 0), event(-50, "interrupted", 9, code=130)], 60, "interrupted", "at step 9"),
        ([event(-90, "preempted", 9), event(-50, "resume", 9)], 60, "running", ""),
        ([event(-90, "start", 0), event(-50, "stopped", 9, reason="numbers diverged")], 60, "stopped", "diverged"),
        ([event(-90, "start", 0), event(-50, "finished", 100)], 9e9, "finished", ""),
        ([], 60, "running", ""),
        ([], 7200, "silent", ""),
    ],
)
def test_status(tmp_path, events, age, word, detail):
    shift = NOW - age - max([e["time"] for e in events], default=NOW - 591)
    rows = [metrics_row(s) for s in range(10)]
    rows = [{**row, "time": NOW - age - 10 + row["step"]} for row in rows]
    run = make_run(tmp_path / "run", rows, [{**e, "time": e["time"] + shift} for e in events])
    status = RunHistory(run).status
    assert status[0] == word and detail in status[1]


def test_of_two_rows_of_a_step_the_later_counts_and_cut_lines_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", [metrics_row(5, loss=9.0), *(metrics_row(s) for s in range(10))])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    losses = RunHistory(run).finite("loss")
    assert losses[:, 0].tolist() == list(range(10)) and losses[5, 1] == pytest.approx(1.45)
