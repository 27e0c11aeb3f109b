"""The report page holds what the run folder says, whatever the folder lacks."""

import base64
import io
import json
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.errors import InputError
from infmae_jax.report import summary, write_report
from infmae_jax.reporting import history
from infmae_jax.reporting.history import RunHistory
from tests.reporting.run_folders import NOW, event, make_run, metrics_row, parse, write_lines

CURVES = 8  # of `metrics_row`: all but step, time, epoch, and the counts that stay zero


def pictures(page, form):
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    return [source for source in sources if source.startswith(f"data:image/{form};base64,")]


def test_page_of_an_eventful_run(eventful):
    path = write_report(eventful)
    assert path == eventful / "report.html"
    page = parse(path)
    text = page.text
    for expected in (
        "finished step 100 of 100", "loss, last 0.51", "loss, first 1.5", "loss, best 0.51 at step 99",
        "images per second 40", "goodput 87.5%", "device memory 1.25 GiB", "updates skipped 2", "restarts 1",
        "roll-backs 1", "checkpoints damaged 1", "saves failed 1", "checkpoints saved 1", "parameters 2,934,512",
        "GFLOP per image 1.25", "devices 2 x cpu", '"fsdp": 1', "shares.stepping 0.9",
        "reason digest of encoder/x differs", "hit/a.jpg b<1>", "2 records", "loss nan", "to step 20",
        "restart (1)", "skipped update (2)", "roll-back (1)", "checkpoint damaged (1)", "checkpoint not saved (1)",
        '"base_learning_rate": 0.004', '"jax": "0.10.2"', '"name": "encoder/x"',
        "loss: 0.51", "skipped updates: 2",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Problem" not in text
    assert len(pictures(page, "png")) == CURVES and len(pictures(page, "webp")) == 4
    assert page.count("meta", name="viewport") == 1 and not page.count("script")


def test_events_are_marked_on_the_curves(eventful):
    def loss():
        source = pictures(parse(write_report(eventful)), "png")[0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")).astype(int)

    marked = loss()
    (eventful / "events.jsonl").unlink()
    plain = loss()
    assert marked.shape == plain.shape == (480, 840, 3)
    for colour in ((31, 119, 180), (224, 138, 0), (123, 63, 160), (198, 40, 40)):
        near = lambda picture: (np.abs(picture - colour).max(axis=-1) < 4).any()  # noqa: E731
        assert near(marked) and not near(plain), colour


def test_nothing_is_loaded_from_elsewhere(eventful):
    page = parse(write_report(eventful))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    html = (eventful / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", html)


def test_text_summary(eventful):
    lines = summary(RunHistory(eventful)).splitlines()
    assert lines[0].split(maxsplit=1) == ["status", "finished"]
    assert lines[1].split(maxsplit=1) == ["steps", "100 of 100"]
    assert "restarts                  1" in lines


def test_metrics_of_any_task_are_drawn(tmp_path):
    page = parse(write_report(make_run(tmp_path / "run", [metrics_row(s, **{"val/top1": 0.1 * s}) for s in (1, 2)])))
    assert "val/top1: 0.2" in page.text and len(pictures(page, "png")) == CURVES  # none skipped, one more


def test_every_kind_of_picture_is_shown(tmp_path):
    run = make_run(tmp_path / "run", [metrics_row(0)], pictures=range(0, 100, 10))
    Image.new("RGB", (9, 9)).save(run / "pictures" / "confusion_00000090.png")
    page = parse(write_report(run))
    assert len(pictures(page, "webp")) == 4 + 1
    assert [f"step {s}" in page.text for s in (0, 30, 60, 90)] == [True] * 4


# ---- Whatever is missing ---------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="is not a run folder.*--workdir"):
            write_report(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize("present", ["config.json", "run_info.json", "metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("state", ["whole", "cut", "empty", "rubbish"])
def test_any_single_file_gives_a_page(eventful, tmp_path, present, state):
    alone = tmp_path / "alone"
    alone.mkdir()
    content = (eventful / present).read_bytes()
    content = {"whole": content, "cut": content[: len(content) * 2 // 3], "empty": b"", "rubbish": b"\xff\0{[" * 9}
    (alone / present).write_bytes(content[state])
    page = parse(write_report(alone))
    assert "run_info.json is missing" in page.text or present == "run_info.json"
    if present.endswith(".json") and state != "whole":
        assert f"{present} cannot be read" in page.text
    if present == "metrics.jsonl" and state == "cut":
        assert len(pictures(page, "png")) == CURVES and "loss, last" in page.text


def test_a_run_killed_at_step_0(tmp_path):
    page = parse(write_report(make_run(tmp_path / "run", record=False)))
    assert "new step 0" in page.text and not page.count("figure")


def test_broken_pictures_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", pictures=[0, 10, 20])
    path = run / "pictures" / "step_00000020.png"
    path.write_bytes(path.read_bytes()[:60])
    (run / "pictures" / "step_00000010.png").write_text("no picture")
    page = parse(write_report(run))
    assert page.count("img") == 1 and "step 0" in page.text


def test_a_page_that_cannot_be_written(eventful, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken.*cannot be written"):
        write_report(eventful, tmp_path / "taken" / "page.html")
    assert write_report(eventful, tmp_path / "new" / "page.html").is_file()
    assert not list(tmp_path.glob("**/*.partial"))


texts = st.text(max_size=12) | st.sampled_from(["<script>alert(1)</script>", "\"'>&", "nan", "\ud800"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
row_keys = st.sampled_from(["step", "time", "loss", "goodput", "param_norm/a", "mfu", "skipped_updates"]) | texts
event_keys = st.sampled_from(["time", "step", "event", "records", "seconds_blocked", "to_step", "shares"]) | texts
names = st.sampled_from(["start", "resume", "skip", "rollback", "save", "finished", "stopped", "<b>"])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.dictionaries(row_keys, anything), max_size=4),
    st.lists(st.fixed_dictionaries({"event": names | anything}, optional={"time": anything, "step": anything}).flatmap(
        lambda known: st.dictionaries(event_keys, anything).map(lambda more: {**more, **known})), max_size=4),
    st.dictionaries(texts | st.sampled_from(["data", "duration", "data_set"]), anything, max_size=3),
)  # fmt: skip
def test_whatever_the_files_hold_there_is_a_page_without_foreign_tags(tmp_path_factory, rows, events, settings):
    run = tmp_path_factory.mktemp("run")
    steady = [{"time": NOW, "step": i, "event": "skip", **e} for i, e in enumerate(events)]
    write_lines(run / "metrics.jsonl", [{"step": i, **row} for i, row in enumerate(rows)])
    write_lines(run / "events.jsonl", events + steady)
    for name in ("config.json", "run_info.json"):
        (run / name).write_text(json.dumps(settings))
    page = parse(write_report(run))
    assert page.count("style") == page.count("title") == page.count("b") == 1 and not page.count("script")
    assert summary(RunHistory(run)).replace("\n", " ").isprintable()


@pytest.mark.parametrize("place", ["key", "record", "reason", "config", "version"])
def test_everything_is_escaped(tmp_path, place):
    evil = "\x1b[31m</script></table><script>alert(\"x\")</script><img src=x onerror='alert(1)'>&amp;\u202e$\\frac{"
    run = make_run(
        tmp_path / "run",
        [metrics_row(0, **({evil: 1.0} if place == "key" else {}))],
        [event(0, evil if place == "reason" else "skip", 0, reason=evil, records=[evil])],
    )
    if place == "config":
        config = {evil: {"a": evil}, "duration": evil, "data": {"batch_size": evil}}
        (run / "config.json").write_text(json.dumps(config))
    if place == "version":
        (run / "run_info.json").write_text(json.dumps({"devices": evil, "versions": {evil: evil}}))
    page = parse(write_report(run))
    assert not page.count("script") and not [a for t, a in page.tags if t == "img" and a["src"] == "x"]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert evil.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e") in page.text


def test_the_page_of_the_longest_run_is_small(tmp_path):
    rng = np.random.default_rng(0)
    total = 476_939
    rows = [
        metrics_row(s, loss=rng.lognormal(), grad_norm=rng.lognormal(), images_per_second=rng.normal(9e3, 99))
        for s in range(0, total, 50)
    ]
    rows[5000]["loss"] = 777.25  # one spike, which must be seen
    events = [
        event(s, "skip", s, reason="spike", records=[f"key{s}/{i}" for i in range(512)]) for s in range(0, total, 900)
    ]
    path = write_report(make_run(tmp_path / "run", rows, events))
    assert path.stat().st_size < 1_500_000
    text = parse(path).text
    assert f"loss: {rows[-1]['loss']:.4g}" in text and "The latest 300 of 530 events" in text
    assert "more in events.jsonl" in text


def test_a_very_long_file_is_read_in_bounded_memory(tmp_path, monkeypatch):
    """Rows from the first to the last; that they are not all is said."""
    rows = [metrics_row(s, time=NOW + s) for s in range(20_000)]
    run = make_run(tmp_path / "run", rows)
    monkeypatch.setattr(history, "MOST_ROWS", 2500)
    tracemalloc.start()
    read = RunHistory(run)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    steps = [row["step"] for row in read.rows]
    assert steps[0] == 0 and steps[-1] == 19_999 and 2500 <= len(steps) < 2600 and max(np.diff(steps)) < 100
    assert read.problems == [f"metrics.jsonl is long: {len(steps)} rows, evenly spread, are shown"]
    assert most < 16 << 20
    assert read.step == 20_000


def test_a_row_of_an_evaluation_says_how_many_steps_are_made(tmp_path):
    run = make_run(tmp_path / "run", [metrics_row(5, time=NOW), {"step": 6, "time": NOW, "val_miou": 0.5}])
    assert RunHistory(run).step == 6
