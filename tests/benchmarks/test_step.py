"""The measured step is the one that trains, and every row says what it was."""

import dataclasses

import jax
import numpy as np
import pytest

from infmae_jax.benchmarks import report, step
from infmae_jax.benchmarks.training import TrainingProgram, synthetic_batch
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize


@pytest.fixture(scope="module")
def program(smoke):
    program = TrainingProgram(smoke, 4)
    program.start()
    return program


def test_the_program_trains_on_the_synthetic_batch(smoke, program):
    before = jax.device_get(program.state.params)
    batch = synthetic_batch(smoke, 4)
    expected = InfMAE(smoke.model).apply({"params": before}, normalize(batch["image"]), batch["ids_keep"]).loss
    np.testing.assert_allclose(program(1), expected, rtol=1e-5)
    later = program(30)
    assert int(program.state.step) == 31 and later < 0.9995 * expected


def test_rows_of_a_grid(smoke):
    result = step.step(smoke, step.Grid((4,)), rounds=2)
    visible, published = result["rows"]
    assert visible["name"].endswith("visible only") and published["name"].endswith("as published")
    for row in result["rows"]:
        assert 0 < row["low"] <= row["images_per_second"] <= row["high"] and row["compile_s"] > 0
        assert row["mfu"] is None  # nobody publishes the peak of this CPU
    assert visible["memory_gib"] < published["memory_gib"]
    assert "faster_than_published_way" in report.text(result) and result["device"].endswith("cpu")


def test_every_combination_is_named(smoke):
    grid = step.Grid((2, 4), ("tiny", "small"), ("float32", "bfloat16"), (False, True))
    rows = {name: row for group in grid.groups(smoke) for name, row in group.items()}
    assert len(rows) == 2**5
    config, batch = rows["small, batch 4, bfloat16, remat, as published"]
    assert (config.model.encoder.widths[0], batch, config.model.encoder.dtype, config.model.encoder.remat, config.model.encoder.visible_only) == (
        128, 4, "bfloat16", True, False,
    )  # fmt: skip


def test_pytorch_in_turns(smoke):
    pytest.importorskip("torch", reason="PyTorch is not installed; it is needed only to compare with it")
    result = step.step_against_torch(smoke, 2, ["eager"], rounds=2)
    ours, theirs = result["rows"]
    np.testing.assert_allclose(theirs["first_loss"], ours["first_loss"], rtol=1e-5)
    assert "(" in theirs["ours_is_faster_by"]


def test_another_computation_is_not_compared(smoke, monkeypatch):
    torch_model = pytest.importorskip("infmae_jax.benchmarks.torch_model", exc_type=Exception)
    monkeypatch.setattr(torch_model, "CONV_EPS", 1.0)
    with pytest.raises(ArithmeticError, match="not the same computation"):
        step.step_against_torch(dataclasses.replace(smoke), 2, ["eager"], rounds=1)
