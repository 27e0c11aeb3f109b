"""Stochastic depth: its rates, its expectation, and that it is not there at all when it is off."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models import blocks, transformer
from infmae_jax.models.config import InfMAEConfig, variant
from infmae_jax.models.encoder import HybridEncoder
from infmae_jax.models.vit import ViTEncoder
from tests.models.parameters import randomised

ENCODERS = {"hybrid": HybridEncoder, "vit": ViTEncoder}
TINY = dict(widths=(8, 12, 16), depths=(1, 1, 2), heads=2, depthwise="conv")  # which compiles faster
IMAGES = np.random.default_rng(0).standard_normal((4, 32, 48, 1)).astype(np.float32)
IDS_KEEP = np.tile(np.array([[4, 1, 2]], np.int32), (4, 1))


class Drop(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        return blocks.drop_path(self, x, self.rate)


def test_rates_grow_linearly_over_all_blocks():
    hybrid = HybridEncoder(variant("base", drop_path=0.2).encoder).bind({})
    rates = [block.drop_path for block in (*hybrid.blocks1, *hybrid.blocks2, *hybrid.blocks3)]
    np.testing.assert_allclose(rates, [0.2 * i / 14 for i in range(15)])
    vit = ViTEncoder(variant("base", kind="vit", depths=(0, 0, 12), drop_path=0.1).encoder)
    vit = vit.bind({"params": {"cls_token": np.zeros((1, 1, 768), np.float32)}})
    np.testing.assert_allclose([block.drop_path for block in vit.blocks], [0.1 * i / 11 for i in range(12)])


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_whole_samples_are_dropped_and_the_expectation_stays(dtype, tolerance):
    rate, n = 0.3, 4000
    x = np.random.default_rng(0).uniform(1, 2, (n, 2, 3)).astype(dtype)
    out = Drop(rate).apply({}, x, rngs={"drop_path": jax.random.key(0)})
    assert out.dtype == x.dtype
    ratio = np.asarray(out, np.float64) / np.asarray(x, np.float64)
    dropped = (ratio == 0).all(axis=(1, 2))
    np.testing.assert_allclose(ratio[~dropped], 1 / (1 - rate), rtol=tolerance)
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    assert abs(ratio.mean() - 1) < 4 * (rate / (1 - rate) / n) ** 0.5 + tolerance


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_the_two_branches_of_a_block_are_dropped_independently(kind):
    rng = np.random.default_rng(0)
    if kind == "conv":
        block, layout = blocks.ConvBlock(8, 2, "float32", "shift", drop_path=0.5), blocks.Layout((1, 2))
        inputs = (np.repeat(rng.standard_normal((1, 2, 4, 8)).astype(np.float32), 64, axis=0), layout)
    else:
        block = transformer.TransformerBlock(2, 2, "float32", drop_path=0.5)
        inputs = (np.repeat(rng.standard_normal((1, 3, 8)).astype(np.float32), 64, axis=0),)
    variables = {"params": randomised(block, *inputs)}
    out = block.apply(variables, *inputs, rngs={"drop_path": jax.random.key(1)})
    groups = np.unique(np.asarray(out).reshape(64, -1).round(5), axis=0)
    assert len(groups) == 4, "both, first, second, none"
    assert any(np.allclose(group, inputs[0][0].reshape(-1), atol=1e-5) for group in groups)


@pytest.mark.parametrize("kind", ["hybrid", "vit"])
def test_off_is_the_same_program(kind):
    """Without a rate, or without its random stream, the lowered program is that of a model without drop path."""

    key = jax.random.key(0)

    def program(rate, *streams):
        model = ENCODERS[kind](InfMAEConfig().replace(kind=kind, drop_path=rate, **TINY).encoder)
        params = jax.eval_shape(model.init, key, IMAGES, IDS_KEEP)
        rngs = dict.fromkeys(streams, key)
        return jax.jit(lambda params: model.apply(params, IMAGES, IDS_KEEP, rngs=rngs)).lower(params).as_text()

    off = program(0.0)
    assert program(0.4, "dropout") == program(0.0, "drop_path") == off
    assert program(0.4, "drop_path") != off


@pytest.mark.parametrize("kind", ["hybrid", "vit"])
def test_the_key_decides_and_recomputation_repeats_it(kind):
    def gradient(remat):
        model = ENCODERS[kind](InfMAEConfig().replace(kind=kind, drop_path=0.5, remat=remat, **TINY).encoder)

        def loss(params, key):
            return jnp.square(model.apply(params, IMAGES, IDS_KEEP, rngs={"drop_path": key})[..., 0]).sum()

        return model, jax.jit(jax.grad(loss))

    model, plain = gradient(remat=False)
    key, other = jax.random.split(jax.random.key(0))
    params = {"params": randomised(model, IMAGES, IDS_KEEP)}
    grads = jax.tree.leaves(plain(params, key))
    for grad, recomputed in zip(grads, jax.tree.leaves(gradient(remat=True)[1](params, key)), strict=True):
        np.testing.assert_allclose(grad, recomputed, rtol=1e-4, atol=1e-5)
    others = jax.tree.leaves(plain(params, other))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match=f"model.encoder.drop_path={rate}"):
        variant("tiny", drop_path=rate)
