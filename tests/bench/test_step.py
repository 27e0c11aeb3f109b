"""The measured step is the one that trains, and every row says what it was."""

import jax
import numpy as np
import pytest

from infmae_jax.bench import flops, results, step
from infmae_jax.bench.features import features
from infmae_jax.bench.step import TimedStep, synthetic_batch
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize


@pytest.fixture(scope="module")
def program(smoke):
    program = TimedStep(smoke, 4)
    program.start()
    return program


def test_the_program_trains_on_the_synthetic_batch(smoke, program):
    before = jax.device_get(program.state.params)
    batch = synthetic_batch(program.program.task)
    expected = jax.jit(InfMAE(smoke.model).apply)({"params": before}, normalize(batch["image"]), batch["ids_keep"]).loss
    np.testing.assert_allclose(program(1), expected, rtol=1e-5)
    later = program(30)
    assert int(program.state.step) == 31 and later < 0.9995 * expected


def test_both_ways_are_rows(smoke):
    result = step.step(smoke, [4], rounds=1)
    visible, published = result["rows"]
    assert visible["name"].endswith("visible only") and published["name"].endswith("as published")
    assert visible["mfu"] is None  # nobody publishes the peak of this CPU
    assert visible["memory_gib"] < published["memory_gib"]
    assert visible["useful_gflop_per_image"] == flops.useful_gflop(smoke.model, (64, 64), step.visible_tokens(smoke))
    assert "first_is_faster_by" in results.text(result) and result["device"].endswith("cpu")


def test_what_does_not_fit_is_a_row(smoke, monkeypatch):
    def start(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(TimedStep, "start", start)
    rows = step.step(smoke, [4], rounds=1)["rows"]
    assert len(rows) == 2 and all("does not fit" in row["note"] for row in rows)


def test_features_of_noise(smoke):
    (row,) = features(smoke, batch=2, rounds=1, against_torch=False)["rows"]
    assert row["name"] == "ours" and row["images_per_second"] > 0


def test_pytorch_in_turns(smoke):
    pytest.importorskip("torch", reason="PyTorch is not installed; it is needed only to compare with it")
    result = step.step(smoke, [2], 2, ["eager"])
    ours, theirs = result["rows"]
    np.testing.assert_allclose(theirs["first_loss"], ours["first_loss"], rtol=1e-5)
    assert "(" in theirs["first_is_faster_by"]


def test_another_first_loss_of_pytorch_is_a_failure(smoke, monkeypatch):
    monkeypatch.setattr(step, "torch_steps", lambda *_: {"PyTorch eager": lambda times: 0.0})
    result = step.step(smoke, [2], 1, ["eager"])
    ours, theirs = result["rows"]
    assert result["failed"] and theirs["note"] == "another first loss: not the same computation"
    assert ours["images_per_second"] > 0


def test_another_computation_is_not_compared(smoke, monkeypatch):
    torch_model = pytest.importorskip("infmae_jax.bench.torch_model", exc_type=Exception)
    monkeypatch.setattr(torch_model, "CONV_EPS", 1.0)
    ours, theirs = step.step(smoke, [2], 1, ["eager"])["rows"]
    assert theirs["note"] == "another first loss: not the same computation" and "images_per_second" not in theirs
    assert ours["images_per_second"] > 0
