"""Mistakes of the user end in one line, a non-zero exit code, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands

ROOT = Path(__file__).resolve().parents[1]
SMOKE = f"--config={ROOT}/configs/pretrain/tiny_cpu.py:smoke"


def run_process(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([SMOKE, "--config.durration=3 steps"], "durration"),
        (["--config.model.encoder.widhts=3"], "did you mean model.encoder.widths?"),
        ([SMOKE, "--config.data.image_size=(100,96)"], "100x96"),
        ([SMOKE, "--config.duration=soon"], "key duration: duration 'soon' is not understood"),
        ([SMOKE.removesuffix(":smoke")], "data.shards"),
        ([SMOKE, "--config.data.shards=nowhere"], "nowhere"),
        ([SMOKE, "--config.seed=one"], "seed"),
        (["--config=configs/pretrain/nowhere.py"], "nowhere.py"),
        ([f"{SMOKE}y"], "smokey"),
        ([SMOKE, "extra"], "unexpected argument 'extra'"),
        ([SMOKE, "--wordir=x"], "wordir"),
    ],
)
def test_pretrain(flags, message, tmp_path):
    workdir = tmp_path / "run"
    run = run_process if message == "durration" else commands.run  # of one, what a real process prints
    result = run("infmae_jax.pretrain", *flags, f"--workdir={workdir}")
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "bench flops|step|forms|profile|features|segment|detect|small_target|data|all"),
        (["flops", "step"], "bench flops|step"),
        (["step", "--batch_sizes=many"], "--batch_sizes=many"),
        (["step", "--quick", "--variant=giant"], "giant"),
        (["step", "--config.model.encoder.widhts=3", "--dtype=float8"], "widhts"),
        (["data", "--shards=nowhere"], "nowhere"),
    ],
)
def test_bench(flags, message):
    result = commands.run("infmae_jax.bench.__main__", *flags)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr and not result.stdout


def test_bench_prints_a_table_and_json(tmp_path):
    result = run_process("infmae_jax.bench", "flops", "--quick", f"--output={tmp_path}")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert json.loads((tmp_path / "bench.json").read_text()) == [report]
    assert report["subject"] == "flops" and report["versions"]["jax"] and report["device"].endswith("cpu")
    for row in report["rows"]:
        assert row["stage"] in result.stderr


@pytest.mark.parametrize(
    "command, flags, message",
    [
        ("embed", ["--checkpoint=random"], "error: --output is missing: --help says what it is"),
        ("finetune", ["--checkpoint=random", "--workdir=RUN"], "error: --config is missing: name one of"),
    ],
)
def test_what_is_missing_is_said(command, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = commands.run(f"infmae_jax.{command}", *flags)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message), done.stderr
    assert not os.listdir(tmp_path)


def test_help_lists_the_flags_that_other_modules_define():
    command = [sys.executable, "-m", "infmae_jax.predict", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert all(f"--{name}:" in done.stdout for name in ("checkpoint", "output", "tile", "threshold"))


def test_a_process_tells_what_it_is_doing():
    """On SIGQUIT, and goes on."""
    script = """
import time
from data_pipelines.commands import run_command

def waits_for_godot(args):
    print("ready", flush=True)
    time.sleep(100)

run_command(waits_for_godot)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGQUIT)
        told = ""
        while "waits_for_godot" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        assert process.poll() is None
        process.kill()


_COLLECTED = """
import gc, os, signal, sys, time
from data_pipelines.commands import run_command

def interrupted(phase, info):
    gc.callbacks.remove(interrupted)
    os.kill(os.getpid(), signal.SIGINT)

def main(args):
    gc.callbacks.append(interrupted)
    gc.collect()
    time.sleep(20)

run_command(main)
"""


def test_ctrl_c_that_python_ignores_comes_again():
    """JAX has a callback of the garbage collector, in which KeyboardInterrupt is printed and forgotten."""
    done = subprocess.run([sys.executable, "-c", _COLLECTED], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
