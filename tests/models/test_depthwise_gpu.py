"""The kernels for NVIDIA GPUs: in Pallas' interpreter against the form for CPUs, and lowered without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models import depthwise, depthwise_gpu

pytestmark = pytest.mark.skipif(not depthwise_gpu.AVAILABLE, reason="this JAX has no Triton backend of Pallas any more")


def inputs(r, width, grid, kept, dtype):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(grid[0] * grid[1])[:kept] for _ in range(2)]).astype(np.int32)
    cells, grad = (jnp.asarray(rng.standard_normal((2, kept, r, r, width)), dtype) for _ in range(2))
    return cells, jnp.asarray(rng.standard_normal((5, 5, width)), dtype), jnp.asarray(ids), grad


@pytest.mark.parametrize("r, width, grid, kept", [(2, 48, (3, 4), 6), (4, 8, (2, 2), 3)])
def test_values_and_gradients_are_those_of_shifted_products(monkeypatch, r, width, grid, kept):
    """Widths of several programs and of one, and patches in one group and in several."""
    monkeypatch.setattr(depthwise_gpu, "_INTERPRET", True)
    cells, kernel, ids, grad = inputs(r, width, grid, kept, jnp.float32)

    @jax.jit
    def by_kernels():
        return depthwise_gpu.forward(grid, cells, kernel, ids), *depthwise_gpu.backward(grid, cells, kernel, ids, grad)

    out, pullback = jax.vjp(lambda *a: depthwise.on_visible(*a, ids, grid, "shift"), cells, kernel)
    for ours, expected in zip(by_kernels(), (out, *pullback(grad)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_lowered_for_gpus_and_nothing_else_convolves():
    cells, kernel, ids, grad = inputs(2, 16, (3, 3), 4, jnp.bfloat16)
    neighbours = jax.jit(depthwise_gpu._neighbours, static_argnums=1)(ids, (3, 3))

    def step(cells, kernel, neighbours, grad):  # what one device computes
        convolve, weight_gradient = depthwise_gpu._convolve.__wrapped__, depthwise_gpu._weight_gradient.__wrapped__
        return convolve(cells, kernel, neighbours), weight_gradient(cells, grad, neighbours)

    device, target = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"), "__gpu$xla.gpu.triton"
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
        export = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=allowed)
        text = export(cells, kernel, neighbours, grad).mlir_module()
    assert text.count(f"@{target}") == 2
    assert "stablehlo.convolution" not in text


def test_the_kernel_is_for_nvidia_and_others_compute_as_ever():
    cells, kernel, ids, _ = inputs(2, 8, (2, 2), 2, jnp.float32)
    out = jax.jit(depthwise.on_visible, static_argnums=(3, 4))(cells, kernel, ids, (2, 2), "kernel")
    np.testing.assert_array_equal(out, depthwise.on_visible(cells, kernel, ids, (2, 2), "auto"))


def test_each_device_convolves_its_own_samples(monkeypatch):
    """XLA cannot split a kernel: it would bring the whole batch to every device."""
    monkeypatch.setattr(depthwise_gpu, "_INTERPRET", True)
    cells, kernel, ids, _ = inputs(2, 8, (2, 2), 2, jnp.float32)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    placed = [jax.device_put(x, layout) for x, layout in ((cells, split), (kernel, whole), (ids, split))]
    step = jax.jit(lambda *a: depthwise_gpu.forward((2, 2), *a)).lower(*placed).compile()
    assert "all-gather" not in step.as_text()
    expected = depthwise.on_visible(cells, kernel, ids, (2, 2), "shift")
    np.testing.assert_allclose(step(*placed), expected, rtol=1e-5, atol=1e-5)
