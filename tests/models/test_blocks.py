"""Activation and attention against formulas written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models import blocks, transformer
from infmae_jax.models.config import variant

POINTS = np.linspace(-9, 9, 361)
PHI = np.array([0.5 * math.erfc(-x / 2**0.5) for x in POINTS])
SLOPE = PHI + POINTS * np.exp(-0.5 * POINTS**2) / (2 * math.pi) ** 0.5


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-7), ("bfloat16", 2**-8)])
def test_gelu_and_its_slope(dtype, tolerance):
    x = jnp.asarray(POINTS, dtype)
    exact = np.asarray(x, np.float64)
    value, slope = jax.jit(lambda x: (blocks.gelu(x), jax.vmap(jax.grad(blocks.gelu))(x)))(x)
    assert value.dtype == slope.dtype == x.dtype
    np.testing.assert_allclose(
        np.asarray(value, np.float64), np.interp(exact, POINTS, POINTS * PHI), rtol=tolerance, atol=2 * tolerance
    )
    np.testing.assert_allclose(
        np.asarray(slope, np.float64), np.interp(exact, POINTS, SLOPE), rtol=tolerance, atol=2 * tolerance
    )


def test_gelu_in_float64():
    with jax.enable_x64(True):
        value, slope = jax.jit(lambda x: (blocks.gelu(x), jax.vmap(jax.grad(blocks.gelu))(x)))(jnp.asarray(POINTS))
        np.testing.assert_allclose(value, POINTS * PHI, rtol=0, atol=1e-14)
        np.testing.assert_allclose(slope, SLOPE, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mean", [0, 1, 30, 300])  # of values that vary by 1; bfloat16 has steps of 2 at 300
def test_norms_of_bfloat16_lose_no_more_than_its_rounding(mean):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 256)) + mean, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + blocks.TOKEN_EPS)
    norm = blocks.layer_norm("bfloat16", blocks.TOKEN_EPS)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=0.01)


@pytest.mark.parametrize("method, most", [("xla", None), ("heads", 1e9), ("heads", 0)])  # at once, one at a time
@pytest.mark.parametrize("first", [0, 3])
def test_attention_against_loops(monkeypatch, method, most, first):
    monkeypatch.setattr(transformer, "_MOST_LOGITS", most)
    with jax.enable_x64(True):
        module, rng = transformer.Attention(heads=2, dtype="float64", method=method), np.random.default_rng(0)
        x = rng.standard_normal((2, 5, 8))
        params = module.init(jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)
        out = jax.jit(module.apply, static_argnums=2)({"params": params}, x, first)
        qkv = x @ np.asarray(params["qkv"]["kernel"]) + np.asarray(params["qkv"]["bias"])[None, None]
        expected = np.zeros((2, 5, 8))
        for sample in range(2):
            for head in range(2):
                q, k, v = (qkv[sample, :, part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
                for token in range(5):
                    weights = np.exp([q[token] @ key / 2 for key in k])
                    expected[sample, token, head * 4 : head * 4 + 4] = weights @ v / weights.sum()
        expected = expected @ np.asarray(params["proj"]["kernel"]) + np.asarray(params["proj"]["bias"])[None, None]
        np.testing.assert_allclose(out, expected[:, first:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1e9, 0])
def test_heads_before_tokens_have_the_same_gradients(monkeypatch, most):
    monkeypatch.setattr(transformer, "_MOST_LOGITS", most)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 7, 12), "float64")
        params = transformer.Attention(heads=3, dtype="float64").init(jax.random.key(1), x)

        def gradients(method):
            def loss(params, x):
                return (transformer.Attention(3, "float64", method).apply(params, x, 2) ** 2).sum()

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

        expected = gradients("xla")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), gradients("heads"), expected)


def test_heads_are_taken_one_at_a_time_by_the_logits_of_one_device():
    x = jax.ShapeDtypeStruct((64, 196, 64), jnp.bfloat16)
    module = transformer.Attention(heads=16, dtype="bfloat16")  # on CPUs too
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
    assert "while" in jax.jit(module.apply).lower(params, x).as_text()  # 64 images: 150 MiB
    with jax.sharding.use_abstract_mesh(mesh):  # 16 a device
        assert "while" not in jax.jit(lambda *arguments: module.apply(*arguments)).lower(params, x).as_text()


@pytest.mark.parametrize("tokens, fused", [(196, True), (49, False)])
def test_cudnn_attention_is_asked_for_where_the_number_of_tokens_is_even(monkeypatch, tokens, fused):
    """The kernel trains on even numbers of tokens only; what is asked of JAX is seen without a GPU."""
    asked = []

    def stand_in(query, key, value, implementation):
        asked.append((query.shape, query.dtype, implementation))
        return jax.nn.dot_product_attention(query, key, value)

    module = transformer.Attention(heads=2, dtype="bfloat16", method="cudnn")
    plain = transformer.Attention(heads=2, dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (1, tokens, 16), jnp.bfloat16)
    params = plain.init(jax.random.key(0), x)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "dot_product_attention", stand_in)
        patch.setattr(transformer, "_has_fused_attention", lambda *of: True)
        out = module.apply(params, x, tokens // 4)
    assert asked == ([((1, tokens, 2, 8), jnp.bfloat16, "cudnn")] if fused else [])
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(plain.apply(params, x, tokens // 4), np.float32), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cudnn_attention_by_name_is_that_of_auto_where_there_is_none(dtype):
    """So that a model trained with it on a GPU can be used on any machine, and with any number format."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 16), jnp.dtype(dtype))
    auto, by_name = (transformer.Attention(2, dtype, method) for method in ("auto", "cudnn"))
    assert variant("tiny", attention="cudnn", dtype=dtype).encoder.attention == "cudnn"
    params = auto.init(jax.random.key(0), x)
    np.testing.assert_array_equal(by_name.apply(params, x), auto.apply(params, x))


def test_residual_changes_neither_values_nor_gradients(monkeypatch):
    """It only keeps XLA from summing a gradient again in each of its uses."""
    block = transformer.TransformerBlock(heads=2, mlp_ratio=2, dtype="float32")
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = block.init(jax.random.key(1), x)

    def value_and_gradients():
        def loss(params, x):
            return (block.apply(params, block.apply(params, x)) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    with_it = value_and_gradients()
    monkeypatch.setattr(blocks, "residual", lambda x: x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), with_it, value_and_gradients())


def test_both_ways_to_contract_patches_give_the_same_values_and_gradients():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.standard_normal((2, 3, 2, 4, 2, 4, 5)), rng.standard_normal((4, 4, 5, 6))
        grad = rng.standard_normal((2, 3, 2, 2, 6))
        expected = np.zeros(grad.shape)
        for row in range(2):
            for column in range(2):
                expected[:, :, row, column] = np.tensordot(x[:, :, row, :, column], kernel, axes=3)
        for form in (blocks._contract, blocks._as_matrices, blocks.patch_product):
            value, pullback = jax.vjp(jax.jit(form), x, kernel)
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
            x_grad, kernel_grad = pullback(jnp.asarray(grad))
            np.testing.assert_allclose(x_grad[0, 1, 1, :, 0], np.tensordot(kernel, grad[0, 1, 1, 0], 1), atol=1e-12)
            summed = sum(
                np.tensordot(x[:, :, row, :, column], grad[:, :, row, column], axes=((0, 1), (0, 1)))
                for row in range(2)
                for column in range(2)
            )
            np.testing.assert_allclose(kernel_grad, summed, rtol=0, atol=1e-12)
