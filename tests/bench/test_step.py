"""The measured step is the one that trains, and every row says what it was."""

import dataclasses

import jax
import numpy as np
import pytest

from infmae_jax.bench import flops, results, step
from infmae_jax.bench.features import features
from infmae_jax.bench.step import TimedStep, synthetic_batch
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize
from infmae_jax.training.run import Result


@pytest.fixture(scope="module")
def program(smoke):
    program = TimedStep(smoke, 4)
    program.start()
    return program


def test_the_program_trains_on_the_synthetic_batch(smoke, program):
    before = jax.device_get(program.state.params)
    batch = synthetic_batch(program.program.task)
    expected = InfMAE(smoke.model).apply({"params": before}, normalize(batch["image"]), batch["ids_keep"]).loss
    np.testing.assert_allclose(program(1), expected, rtol=1e-5)
    later = program(30)
    assert int(program.state.step) == 31 and later < 0.9995 * expected


def grid(config, **changes):
    one = dict(models={"model": config.model}, batch_sizes=(4,), dtypes=("float32",), remat=(False,),
               image_sizes=(config.data.image_size,), strides=(4,))  # fmt: skip
    return step.Grid(**(one | changes))


def test_rows_of_a_grid(smoke):
    result = step.step(smoke, grid(smoke), rounds=1)
    visible, published = result["rows"]
    assert visible["name"].endswith("visible only") and published["name"].endswith("as published")
    assert visible["mfu"] is None  # nobody publishes the peak of this CPU
    assert visible["memory_gib"] < published["memory_gib"]
    assert visible["useful_gflop_per_image"] == flops.useful_gflop(smoke.model, (64, 64), step.visible_tokens(smoke))
    assert "faster_than_published_way" in results.text(result) and result["device"].endswith("cpu")


def test_what_does_not_fit_is_a_row(smoke, monkeypatch):
    def start(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(TimedStep, "start", start)
    rows = step.step(smoke, grid(smoke), rounds=1)["rows"]
    assert len(rows) == 2 and all("does not fit" in row["note"] for row in rows)


def test_every_combination_is_named(smoke):
    models = {name: variant(name) for name in ("tiny", "small")}
    every = grid(
        smoke, models=models, batch_sizes=(2, 4), dtypes=("float32", "bfloat16"), remat=(False, True),
        image_sizes=((64, 64), (96, 128)), strides=(4, 2),
    )  # fmt: skip
    rows = {name: row for group in every.groups(smoke) for name, row in group.items()}
    assert len(rows) == 2**7
    config, batch = rows["small, batch 4, 96x128, stride 2, bfloat16, remat, as published"]
    model = config.model
    encoder, stride = model.encoder, config.data.mask.stride
    assert (encoder.widths[0], batch, encoder.dtype, encoder.remat, encoder.visible_only, stride) == (
        128, 4, "bfloat16", True, False, 2,
    )  # fmt: skip
    assert config.data.image_size == (96, 128)


def test_in_the_training_loop(smoke, shards):
    data = dataclasses.replace(smoke.data, shards=(str(shards),))
    config = dataclasses.replace(smoke, model=smoke.model.replace(kind="vit"), data=data)  # the fastest to compile
    result = step.step_in_the_loop(config, batch=4, rounds=1, steps=2)
    alone, looped = result["rows"]
    assert 0 <= looped["host_waits"] < 1 and 0 <= looped["device_idle_at_most"] < 1 and alone["compile_s"] > 0
    assert looped["hours_for_published_schedule"] == pytest.approx(400 * 305_241 / looped["images_per_second"] / 3600)
    assert str(shards) in result["settings"]["shards"]


def test_ending_a_benchmark_ends_it(smoke, monkeypatch):
    """The training loop takes SIGTERM for its own end only."""
    monkeypatch.setattr(step.loop, "train", lambda *args: Result(state=None, step=2, total_steps=9, stop_code=75))
    with pytest.raises(SystemExit) as caught:
        step.step_in_the_loop(smoke, batch=4, rounds=2, steps=3)
    assert caught.value.code == 75


def test_features_of_noise(smoke):
    (row,) = features(smoke, batch=2, rounds=1, against_torch=False)["rows"]
    assert row["name"] == "ours" and row["images_per_second"] > 0


def test_pytorch_in_turns(smoke):
    pytest.importorskip("torch", reason="PyTorch is not installed; it is needed only to compare with it")
    result = step.step_against_torch(smoke, 2, ["eager"], rounds=2)
    ours, theirs = result["rows"]
    np.testing.assert_allclose(theirs["first_loss"], ours["first_loss"], rtol=1e-5)
    assert "(" in theirs["ours_is_faster_by"]


def test_another_computation_is_not_compared(smoke, monkeypatch):
    torch_model = pytest.importorskip("infmae_jax.bench.torch_model", exc_type=Exception)
    monkeypatch.setattr(torch_model, "CONV_EPS", 1.0)
    with pytest.raises(ArithmeticError, match="not the same computation"):
        step.step_against_torch(dataclasses.replace(smoke), 2, ["eager"], rounds=1)
