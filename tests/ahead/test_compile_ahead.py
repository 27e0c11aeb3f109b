"""The command: mistakes end in one line; with libtpu, the smoke model is compiled for a described slice."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from infmae_jax.ahead.targets import COMPILERS
from tests.commands import run

ROOT = Path(__file__).resolve().parents[2]
SMOKE = f"--config={ROOT}/configs/pretrain/tiny_cpu.py:smoke"
COMMAND = "infmae_jax.compile_ahead"
_LIBRARY = Path(os.environ.get(COMPILERS, ""), "libtpu", "libtpu.so")
needs_libtpu = pytest.mark.skipif(
    not (_LIBRARY.is_file() or importlib.util.find_spec("libtpu")),
    reason=f"libtpu is not here: pip install --no-deps --target FOLDER 'libtpu==0.0.42.*' and set {COMPILERS}=FOLDER",
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e-15"], "--topology=v5e-15 is not known: the nearest are v5e-16"),
        (["extra"], "unexpected argument 'extra'"),
        (["--config.durration=3 steps"], "durration"),
        (["--output=configs"], "configs is a folder: name a file"),
        (["--batch=-1"], "batch"),
        (["--features=100x160"], "--features=100x160 is not HEIGHTxWIDTH, both multiples of 16"),
        (["--features=0x16"], "--features=0x16 is not"),
        (["--features=wide"], "such as 512x640"),
        (["--features=160x160", "--largest_batch"], "leave it or --features out"),
    ],
)
def test_mistakes(flags, message):
    result = run(COMMAND, SMOKE, *flags)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr


@needs_libtpu
def test_a_batch_that_does_not_divide_is_answered_by_those_that_do():
    result = run(COMMAND, SMOKE, "--topology=v5e-4", "--batch=6")
    assert result.returncode == 2
    assert "data.batch_size=6 is not divisible by 4 parts" in result.stderr and "use 4 or 8" in result.stderr


@needs_libtpu
def test_the_smoke_model_for_a_slice(tmp_path):
    result = run(COMMAND, SMOKE, "--topology=v5e-4", f"--output={tmp_path}/told.json")
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["fits"] and told["device"] == "4 x TPU v5 lite" and told["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert told["memory_bytes"]["needed"] < 100 * 2**20
    parameters = told["memory_bytes"]["state"] / 3  # weights and two moments
    assert set(told["collectives"]) == {"all-reduce"}  # gradients, and nothing else
    assert told["collectives"]["all-reduce"]["bytes"] <= 1.2 * parameters
    assert 0 < told["estimate"]["mfu"] < 1 and told["cycles"]["total"] > 10_000
    assert len(told["most_expensive"]) == 10
    for line in ("fits: ", "batch 8, 2 a device", "estimated Mcycles", "not measured: it leaves out"):
        assert line in result.stdout


@needs_libtpu
def test_features_on_one_chip():
    result = run(COMMAND, SMOKE, "--topology=v5e-4", "--features=64x96", "--batch=3")
    assert result.returncode == 0, result.stderr
    for line in ("1 x TPU v5 lite", "batch 3, 3 a device", "exchanges a step: none", "convolution stage 1"):
        assert line in result.stdout
    assert "decoder" not in result.stdout
    result = run(COMMAND, SMOKE, "--topology=v5e-4", "--features=64x96", "--batch=1048576")
    last = result.stdout.splitlines()[-1]
    assert result.returncode == 1 and "does not fit" in last and "try a smaller --batch; smaller --features" in last
