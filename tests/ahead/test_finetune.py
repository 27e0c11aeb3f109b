"""Fine-tuning configs go through the same door: the program without data, and the work that is counted of it."""

import dataclasses

import jax
import pytest

from configs.segment import masks_tiny_cpu
from configs.small_target import targets_tiny_cpu
from infmae_jax import compile_ahead
from infmae_jax.models.config import InfMAEConfig
from tests.ahead.test_compile_ahead import COMMAND, needs_libtpu
from tests.commands import run


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    config = InfMAEConfig().replace(widths=(16, 16, 16), depths=(1, 1, 1), heads=2)
    monkeypatch.setattr("infmae_jax.tasks.finetune.variant", lambda name: config)


@pytest.mark.parametrize("module", [masks_tiny_cpu, targets_tiny_cpu])
def test_the_program_is_traced_for_a_mesh_without_data(module):
    config = compile_ahead._config_of(module.get_config("smoke"))
    program = compile_ahead._program(config, jax.devices()[:4])
    assert program.batch_shapes["mask"].shape == (8, 64, 64) and program.mesh.size == 4
    assert config.classes and "--config.encoder.remat=True" in " ".join(compile_ahead._helps(config, 2, 4))


def test_the_work_counted_grows_with_the_image_and_not_with_the_batch():
    config = compile_ahead._config_of(targets_tiny_cpu.get_config("smoke"))
    small = compile_ahead._useful_gflop(config)
    assert compile_ahead._useful_gflop(compile_ahead._with_batch(config, 16)) == small
    large = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=(128, 128)))
    assert 3.9 < compile_ahead._useful_gflop(large) / small < 4.6  # four times, and attention more


@needs_libtpu
def test_the_smallest_program_for_a_slice():
    result = run(COMMAND, f"--config={masks_tiny_cpu.__file__}:smoke", "--topology=v5e-4")
    assert result.returncode == 0, result.stderr
    assert "batch 8, 2 a device" in result.stdout and "decoder or head" in result.stdout
