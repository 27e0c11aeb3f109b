"""Weights for use: written and restored whole or in part, verified."""

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import abstract_params
from infmae_jax.training import digests, storage
from infmae_jax.training.run_folder import restore_params, write_run
from tests.training.damage import checkpoints, flip_a_bit, largest_file


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    model = variant("tiny")
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(model))


def test_weights_are_verified_whole_or_in_part(weights, tmp_path):
    model, params = weights
    write_run(tmp_path, model, MaskConfig(), (64, 64), params, {"made": "by a test"})
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path).params, params)
    encoder = restore_params(tmp_path, subtree="encoder").params
    jax.tree.map(np.testing.assert_array_equal, encoder, {"encoder": params["encoder"]})
    flip_a_bit(largest_file(tmp_path / "checkpoints" / "0" / "params"))
    with pytest.raises(InputError, match=r"has only damaged checkpoints: 0 \(params/.* differ from what was saved\)"):
        restore_params(tmp_path)


def test_weights_of_the_checkpoint_before_a_damaged_one(weights, tmp_path, caplog):
    model, params = weights
    write_run(tmp_path, model, MaskConfig(), (64, 64), params, {})
    later = {"params": jax.tree.map(lambda leaf: leaf + 1, params)}
    storage.start_save(tmp_path, 7, later, storage.make_record(7, digests.host_digests(later), {}, {}))()
    assert restore_params(tmp_path).step == 7
    flip_a_bit(largest_file(tmp_path / "checkpoints" / "7" / "params"))
    restored = restore_params(tmp_path)
    assert restored.step == 0 and "checkpoints/7 is damaged: params/" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
    with pytest.raises(InputError, match=r"only damaged checkpoints: 7 \("):
        restore_params(tmp_path, step=7)
    assert checkpoints(tmp_path) == ["0", "7"]
