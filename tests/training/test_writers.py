"""What a run writes down survives kills, full disks and missing services, and is what was logged."""

import contextlib
import json
import signal
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from infmae_jax.training import line_files
from infmae_jax.training.writers import EventLog, MetricsWriter, read_events, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def row(step, **more):
    return {"step": step, "loss": 1 / (step + 1), "images_per_second": 40.0 + step, **more}


def write_rows(run, steps, first=0, **options):
    with contextlib.closing(MetricsWriter(run, first, **options)) as writer:
        for step in steps:
            writer.write(row(step))
    return writer


def steps_of(run):
    return [r["step"] for r in read_metrics(run)]


def crc32c(data):
    """Castagnoli's checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tensorboard_events(run):
    """All records of the event files, their checksums checked."""
    events = []
    for path in sorted((Path(run) / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            record = data[at + 12 : at + 12 + length]
            for piece, place in ((data[at : at + 8], at + 8), (record, at + 12 + length)):
                crc = crc32c(piece)
                masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
                assert struct.unpack_from("<I", data, place) == (masked,)
            events.append(Event.FromString(record))
            at += 16 + length
    return events


def tensorboard_scalars(run, tag):
    """(step, value) as TensorBoard shows them: a session start drops what was there of its step and later ones."""
    points = []
    for event in tensorboard_events(run):
        if event.session_log.status == SessionLog.START:
            points = [p for p in points if p[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_rows_come_back_as_written_and_every_line_is_strict_json(tmp_path):
    written = [row(0, grad_norm=float("nan")), row(1, grad_norm=float("-inf"), counted=np.int64(3)), row(2)]
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        for each in written:
            writer.write(each)
    found = read_metrics(tmp_path)
    assert all(r.pop("time") > 1e9 for r in found)
    np.testing.assert_equal(found, written)

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_no_run_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == [] and read_events(tmp_path) == []


def test_resuming_and_rewinding_drop_the_rows_to_be_made_again(tmp_path):
    write_rows(tmp_path, range(0, 50, 5))
    with contextlib.closing(MetricsWriter(tmp_path, 25)) as writer:
        assert steps_of(tmp_path) == [0, 5, 10, 15, 20]
        for step in (25, 30, 35):
            writer.write(row(step))
        writer.rewind(12)
        writer.write(row(12))
    assert steps_of(tmp_path) == [0, 5, 10, 12]
    assert tensorboard_scalars(tmp_path, "loss") == [(s, np.float32(1 / (s + 1))) for s in (0, 5, 10, 12)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8))
def test_a_file_cut_anywhere_is_read_and_continued(tmp_path_factory, cut, first):
    run = tmp_path_factory.mktemp("run")
    write_rows(run, range(8))
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    cut %= len(whole) + 1
    path.write_bytes(whole[:cut])
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    survived = sum(end - 1 <= cut for end in ends)  # an object is whole without its line feed
    assert steps_of(run) == list(range(survived))
    closed = sum(end <= cut for end in ends)
    write_rows(run, [20, 21], first=first)
    assert steps_of(run) == [*range(min(closed, first)), 20, 21]


def test_lines_damaged_in_the_middle_are_left_out(tmp_path):
    write_rows(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0 17\n[1]\n\xff\n3\n" + lines[2])
    assert steps_of(tmp_path) == [0, 2]


def test_only_one_process_writes(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0, active=False)) as writer:
        writer.write(row(0))
        writer.rewind(0)
    log = EventLog(tmp_path, active=False)
    log.write("start", 0)
    log.close()
    assert not list(tmp_path.iterdir()) and writer.failures == 0


def test_what_a_stranger_wrote_is_left_out_without_a_hang(tmp_path):
    """In place of numbers: texts, lists, objects, truths; no steps; endless brackets; one endless line."""
    good = json.dumps({"step": 3, "loss": 0.5, "time": 1.0, "event": "save"})
    bad = [
        '{"step": "3", "loss": 1}', '{"step": NaN, "time": 1, "event": "x"}', '{"step": -1, "time": 1, "event": "x"}',
        '{"step": true, "time": 1, "event": "x"}', '{"step": 1e9, "time": 1, "event": "x"}', "[" * 100_000,
        "9" * 10_000,
        '{"step": ' + "9" * 400 + "}", '{"step": 4, "time": "now", "event": "x"}',
        '{"step": 4, "time": 1, "event": 7}',
        '{"a": ' * 50_000,
    ]  # fmt: skip
    mixed = '{"step": 4, "loss": "much", "rate": [1], "mfu": null, "shares": {"a": 1}, "time": 2.0, "grad_norm": "nan"}'
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("w") as file:
            file.write("\n".join([*bad, good, mixed, "x" * 40_000_000]))
    rows = read_metrics(tmp_path)
    assert {"step": 3, "loss": 0.5, "time": 1.0} in rows
    (found,) = [r for r in rows if r["step"] == 4 and "grad_norm" in r]
    assert found.keys() == {"step", "time", "grad_norm"} and np.isnan(found["grad_norm"])
    assert all(isinstance(value, (int, float)) for r in rows for value in r.values())
    assert [event["step"] for event in read_events(tmp_path)] == [3]
    with contextlib.closing(MetricsWriter(tmp_path, 4)):
        pass
    assert [r["step"] for r in read_metrics(tmp_path)][-1] == 3


def test_a_file_of_a_long_run_is_opened_from_its_end(tmp_path):
    """300,000 rows, a hundred MB: parsing all of it would take several seconds and 600 MB."""
    path, steps = tmp_path / "metrics.jsonl", 300_000
    filling = {f"value_{i}": 0.123456789 for i in range(14)}
    text = json.dumps({"step": 1_000_000, "time": 5.0, **filling})
    path.write_text("".join(text.replace("1000000", str(step), 1) + "\n" for step in range(steps)))
    tracemalloc.start()
    began = time.perf_counter()
    with contextlib.closing(MetricsWriter(tmp_path, steps - 50)) as writer:
        writer.write(row(steps - 50))
    rows = read_metrics(tmp_path, at_most=1000)
    seconds, (_, memory) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 3 and memory < 30e6, (seconds, memory)
    found = [r["step"] for r in rows]
    assert found[0] == 0 and found[-1] == steps - 50 and 900 < len(rows) <= 1002 and found == sorted(set(found))
    assert max(np.diff(found)) < 400
    assert read_metrics(tmp_path / "none", at_most=10) == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=30), st.booleans())
def test_lines_from_the_end_are_the_lines_from_the_beginning_reversed(tmp_path_factory, sizes, closed):
    path = tmp_path_factory.mktemp("lines") / "lines"
    lines = [bytes([65 + number % 26]) * size for number, size in enumerate(sizes)]
    data = b"".join(line + b"\n" for line in lines) + (b"" if closed else b"cut")
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_files, "LONGEST_LINE", 200)
        found = list(line_files.lines_from_the_end(path))
    ends = np.cumsum([len(line) + 1 for line in lines]).tolist()
    assert [end for _, end in found] == ends[::-1]
    assert all(line == lines[-1 - i] for i, (line, _) in enumerate(found) if len(lines[-1 - i]) <= 200)


# ---- events.jsonl ----------------------------------------------------------------------------------------------------


def test_events_are_appended_over_restarts(tmp_path):
    for name in ("start", "resume"):
        log = EventLog(tmp_path)
        log.write(name, np.int32(4), records=["a/ä.png", "b"], loss=np.float32("nan"), shape=(1, 2), where=Path("x"))
        log.close()
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"time": 3, "step": 4, "eve')  # killed while it wrote
    first, second = read_events(tmp_path)
    assert (first["event"], second["event"]) == ("start", "resume") and first["time"] <= second["time"]
    assert first["step"] == 4 and first["records"] == ["a/ä.png", "b"] and np.isnan(first["loss"])
    assert first["shape"] == [1, 2] and first["where"] == "x"


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_what_was_logged(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write({**row(3), "grad_norm": float("inf")})
    events = tensorboard_events(tmp_path)
    assert events[0].file_version == "brain.Event:2"
    assert tensorboard_scalars(tmp_path, "images_per_second") == [(3, 43.0)]
    assert tensorboard_scalars(tmp_path, "grad_norm") == [(3, np.inf)]
    assert not {"step", "time"} & {value.tag for event in events for value in event.summary.value}


# ---- Failures that a run survives ------------------------------------------------------------------------------------

_FULL_DISK = """
    import resource, sys
    from infmae_jax.training.writers import EventLog, MetricsWriter, read_events, read_metrics

    def allow(size):  # no file can grow beyond it: write() is cut short there and then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run = sys.argv[1]
    writer, log = MetricsWriter(run, 0), EventLog(run)
    allow(5_000)
    for step in range(200):
        writer.write({"step": step, "loss": 1 / 3})
        log.write("skip", step, records=["key"] * 5)
    assert writer.failures > 100, writer.failures
    full = len(read_metrics(run)), len(read_events(run))
    allow(1_000_000)
    for step in range(200, 210):
        writer.write({"step": step, "loss": 1 / 3})
        log.write("save", step)
    writer.close()
    print(*full)
"""


def run_child(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_costs_lines_but_never_the_run_or_a_whole_line(tmp_path):
    with run_child(_FULL_DISK, tmp_path) as child:
        output, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    rows, events = map(int, output.split())
    assert 10 < rows < 200 and 10 < events < 200
    # Lines differ in length by the digits of their time: a short one may fit where a long one before it did not.
    for steps, count in ((steps_of(tmp_path), rows), ([e["step"] for e in read_events(tmp_path)], events)):
        assert steps[count:] == list(range(200, 210)) and steps == sorted(set(steps)) and steps[:10] == list(range(10))
    for name in ("metrics.jsonl", "events.jsonl"):
        assert all(json.loads(line) for line in (tmp_path / name).read_text().splitlines())
    shown = [step for step, _ in tensorboard_scalars(tmp_path, "loss")]
    assert 10 < len(shown) < 210 and shown[-10:] == list(range(200, 210)) and shown == sorted(set(shown))
    warnings = [line for line in errors.splitlines() if "training goes on" in line]
    assert len(warnings) == 3, errors  # one a file


_WRITES_WITHOUT_END = """
    import itertools, sys
    from infmae_jax.training.writers import EventLog, MetricsWriter

    writer, log = MetricsWriter(sys.argv[1], 0), EventLog(sys.argv[1])
    for step in itertools.count():
        writer.write({"step": step, "loss": 0.5})
        log.write("skip", step)
        if step == 300:
            print("many", flush=True)
"""


def test_a_killed_process_leaves_whole_lines(tmp_path):
    with run_child(_WRITES_WITHOUT_END, tmp_path) as child:
        assert child.stdout.readline() == "many\n"
        child.send_signal(signal.SIGKILL)
    rows, events = steps_of(tmp_path), [e["step"] for e in read_events(tmp_path)]
    assert rows == list(range(len(rows))) and events == list(range(len(events)))
    assert 300 < len(rows) and len(rows) - 1 <= len(events) <= len(rows)
    write_rows(tmp_path, [299], first=299)
    assert steps_of(tmp_path) == list(range(300))


def test_files_that_cannot_be_opened_do_not_end_a_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("in the way")
    (tmp_path / "events.jsonl").mkdir()
    writer = write_rows(tmp_path, range(3))
    log = EventLog(tmp_path)
    log.write("start", 0)
    log.close()
    assert writer.failures == 8  # 3 rows and the rewinding at the start, two files
    assert len([r for r in caplog.records if "training goes on" in r.message]) == 3


def test_mistakes_of_the_caller_are_not_swallowed(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer, pytest.raises(KeyError):
        writer.write({"loss": 1.0})
