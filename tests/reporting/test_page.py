"""The report page holds what the run folder says, whatever the folder lacks."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from infmae_jax.report import facts, summary, write_report
from infmae_jax.reporting.history import read_history
from tests.reporting.run_folders import NOW, event, make_run, metrics_row, parse, write_lines


def test_page_of_an_eventful_run(eventful):
    path = write_report(eventful)
    assert path == eventful / "report.html"
    page = parse(path)
    text = page.text
    for told in (
        "finished step 100 of 100", "loss, last 0.51", "loss, first 1.5", "loss, best 0.51 at step 99",
        "images a second 40", "goodput, last process 87.5 %", "MFU not known for this device",
        "host memory, most 1.25 GiB", "updates skipped 2", "restarts 1", "rollbacks 1", "checkpoints damaged 1",
        "saves failed 1", "parameters 2,934,512", "GFLOP an image 1.25", "devices 2 x cpu", "mesh data 2 x fsdp 1",
        "stepping 90.0 %", "data wait 6.0 %", "1 checkpoints saved, the last at step 20", "0.25 s (median)",
        "reason digest of encoder/x differs", "hit/a.jpg b<1>", "2 records", "loss nan", "to step 20",
        "restart (1)", "skipped update (2)", "rollback (1)", "checkpoint damaged or not saved (2)",
        "optimizer.base_learning_rate 0.004 0.00015", "versions.jax 0.10.2", "encoder/x [3, 4] PartitionSpec()",
    ):  # fmt: skip
        assert told in text, told
    assert "problem" not in text
    charts = page.count("figure", **{"class": "chart"})
    assert charts == 8  # all that was logged but step, time, epoch, and the count that stayed zero
    for mark, times in (("restart", 1), ("rollback", 1), ("damage", 1)):  # two at step 60 are drawn as one
        assert page.count("g", **{"class": f"mark {mark}"}) == charts * times
    images = [a["src"] for t, a in page.tags if t == "img"]
    assert len(images) == 4 and all(source.startswith("data:image/webp;base64,") for source in images)


def test_nothing_is_loaded_from_elsewhere(eventful):
    page = parse(write_report(eventful))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    html = (eventful / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", html)


def test_text_summary(eventful):
    lines = summary(read_history(eventful)).splitlines()
    assert lines[0].split(maxsplit=1) == ["status", "finished"]
    assert lines[1].split(maxsplit=1) == ["steps", "100 of 100"]
    assert "restarts                  1" in lines


def test_layer_norms_are_a_table(tmp_path):
    norms = [{"param_norm/encoder/a": 1.0 + s, "grad_norm/encoder/a": 0.5, "param_norm/b": 2.0} for s in (0, 1)]
    page = parse(write_report(make_run(tmp_path / "run", [metrics_row(s, **n) for s, n in enumerate(norms)])))
    assert "encoder/a 1 2 0.5" in page.text and "b 2 2" in page.text


def test_work_made_again_and_time_down(eventful):
    told = dict(facts(read_history(eventful)))
    # The rollback at -550 lost 30 s since the save at -580; the process seen last at -520 lost the 30 s since then.
    assert told["work made again"] == "60 s" and told["down"] == "20 s"


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
        assert page.count("figure") == 8 and "loss, last" in page.text


def test_a_run_killed_at_step_0(tmp_path):
    page = parse(write_report(make_run(tmp_path / "run", record=False)))
    assert "new step 0 of 100" in page.text and not page.count("figure")


def test_broken_pictures_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", pictures=[0, 10, 20])
    path = run / "pictures" / "step_00000020.png"
    path.write_bytes(path.read_bytes()[:60])
    (run / "pictures" / "step_00000010.png").write_text("no picture")
    page = parse(write_report(run))
    assert page.count("img") == 1 and "before step 0" in page.text


def test_a_page_that_cannot_be_written(eventful, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken.*cannot be written.*--output"):
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


@settings(max_examples=80, deadline=None)
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
    assert page.count("script") == page.count("style") == page.count("title", **{}) - svg_titles(page) == 1
    assert not page.count("b", onclick="") and summary(read_history(run))


def svg_titles(page):
    return page.count("title") - 1


@pytest.mark.parametrize("place", ["key", "record", "reason", "config", "version"])
def test_everything_is_escaped(tmp_path, place):
    evil = "</script></table><script>alert(\"x\")</script><img src=x onerror='alert(1)'>&amp;"
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
    assert page.count("script") == 1 and page.count("img") == 0
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert evil.replace("&amp;", "") in page.text


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
    page = parse(path)
    losses = json.loads(next(a["data-points"] for t, a in page.tags if t == "figure"))
    assert len(losses) <= 2000 and [250_000, 777.25] in losses
    assert "latest 300 of 530 events" in page.text and "more in events.jsonl" in page.text
