"""The command as a process: what a user sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.masking import MaskConfig
from tests.evaluation.conftest import SIZE

REPOSITORY = Path(__file__).resolve().parents[2]


def probe(*arguments):
    command = [sys.executable, "-m", "infmae_jax.linear_probe", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture
def run(tmp_path, small_encoder):
    folder = tmp_path / "run"
    write_run(folder, small_encoder.config, MaskConfig(), SIZE, small_encoder.params, {})
    return folder


def test_smoke_form_makes_its_own_images(tmp_path, run):
    config = "--config=configs/linear_probe/csv.py:smoke"
    out = tmp_path / "out"
    done = probe(config, "--checkpoint=random", f"--config.like={run}", f"--workdir={out}")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["checkpoint"] == "random" and results["top1"]["seeds"]
    assert results["train_images"] + results["test_images"] == 32
    assert "linear probe" in done.stdout and str(out) in done.stdout


def test_a_run_is_probed_once(labelled, run, tmp_path):
    arguments = (f"--checkpoint={run}", f"--workdir={tmp_path / 'out'}", f"--config.csv={labelled}", "--config.seeds=2")
    first = probe(*arguments)
    assert first.returncode == 0, first.stderr
    results = (tmp_path / "out/results.json").stat().st_mtime_ns
    second = probe(*arguments)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert (tmp_path / "out/results.json").stat().st_mtime_ns == results


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--checkpoint=RUN", "--config.csv=LABELS", "--config.label_column=colour"], "'colour'"),
        (["--checkpoint=/no/such/run", "--config.csv=LABELS"], "/no/such/run"),
        (["--checkpoint=RUN", "--config.csv=LABELS"], "07.png"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(labelled, run, tmp_path, arguments, word):
    (labelled.parent / "images/07.png").write_bytes(b"no image")
    names = {"RUN": str(run), "LABELS": str(labelled)}
    arguments = [f"{key}={names.get(value, value)}" for key, value in (a.split("=") for a in arguments)]
    done = probe(*arguments, f"--workdir={tmp_path / 'out'}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(errors) == 1 and word in errors[0]
    assert not (tmp_path / "out").exists()
