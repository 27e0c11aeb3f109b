import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.interop.load import load_encoder, untrained, write
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.infmae import InfMAE


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_model):
    """A run folder whose whole model was initialised with seed 7."""
    images, ids_keep = np.zeros((1, 32, 32, 1), np.float32), np.zeros((1, 1), np.int32)
    params = jax.jit(InfMAE(small_model).init)(jax.random.key(7), images, ids_keep)["params"]
    folder = tmp_path_factory.mktemp("run") / "run"
    trained = TrainedModel(small_model, jax.tree.map(np.asarray, params), image_size=(48, 32))
    write(folder, "run", trained, (48, 32), {})
    return folder, params


def test_a_run_is_restored_without_its_decoder(run, small_model):
    folder, params = run
    encoder = load_encoder(str(folder))
    assert encoder.config == small_model
    assert (encoder.image_size, encoder.step, set(encoder.params)) == ((48, 32), 0, {"encoder"})
    jax.tree.map(np.testing.assert_array_equal, encoder.params["encoder"], dict(params["encoder"]))


def test_untrained_weights_are_those_that_pretraining_starts_from(run, small_model):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        untrained(small_model, seed=7).params["encoder"],
        dict(run[1]["encoder"]),
    )


def test_untrained_like_a_run(run, small_model):
    encoder = load_encoder("random", like=str(run[0]), image_size=(32, 64), seed=1)
    assert (encoder.config, encoder.image_size, encoder.name) == (small_model, (32, 64), "random")
    assert encoder.digest != load_encoder(str(run[0])).digest


def test_digest_tells_weights_and_architectures_apart(small_encoder, other_encoder, small_model):
    again = dataclasses.replace(small_encoder, params=jax.tree.map(np.copy, small_encoder.params))
    assert small_encoder.digest == again.digest
    assert small_encoder.digest != other_encoder.digest
    other = dataclasses.replace(small_encoder, config=small_model.replace(heads=4))
    assert small_encoder.digest != other.digest


def test_plain_vit(small_model):
    model = small_model.replace(kind="vit")
    assert "cls_token" in untrained(model).params["encoder"]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(checkpoint="/no/such/run"), ["/no/such/run", "does not exist"]),
        (dict(checkpoint="RUN", model="small"), ["not the variant 'small'", "hybrid of widths (4, 8, 16)"]),
        (dict(checkpoint="RUN", model="gigantic"), ["gigantic", "tiny, small, base"]),
        (dict(checkpoint="random", model="gigantic"), ["gigantic", "tiny, small, base"]),
        (dict(checkpoint="random", like="/no/such/run"), ["/no/such/run"]),
        (dict(checkpoint="random", like="RUN", model="tiny"), ["like", "model"]),
        (dict(checkpoint="RUN", image_size=(30, 32)), ["(30, 32)", "16"]),
        (dict(checkpoint="RUN", image_size=(32,)), ["(32,)", "16"]),
    ],
)
def test_mistakes_are_named(run, options, words):
    options = {key: str(run[0]) if value == "RUN" else value for key, value in options.items()}
    with pytest.raises(InputError) as error:
        load_encoder(**options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        load_encoder(str(tmp_path))
