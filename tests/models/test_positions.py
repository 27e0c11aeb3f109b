"""Position embeddings at other grids than that of pretraining: recomputed, or interpolated as MCMAE does."""

import jax
import numpy as np
import pytest

from infmae_jax.models import patches
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from tests.models.parameters import randomised

TINY = dict(widths=(8, 12, 16), depths=(1, 1, 1), heads=2, depthwise="conv", decoder_depth=1)


def slow_bicubic(table, out):
    """(h,w,D) -> (*out,D): sixteen taps around every half-pixel centre, Keys' kernel with a = -0.75."""

    def kernel(x):
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    h, w, width = table.shape
    result = np.zeros((*out, width))
    for i, j in np.ndindex(*out):
        y, x = (i + 0.5) * h / out[0] - 0.5, (j + 0.5) * w / out[1] - 0.5
        for row in range(-3, h + 3):
            for column in range(-3, w + 3):
                weight = kernel(y - row) * kernel(x - column)
                result[i, j] += weight * table[np.clip(row, 0, h - 1), np.clip(column, 0, w - 1)]
    return result


@pytest.mark.parametrize("source, grid", [((3, 4), (7, 5)), ((4, 3), (2, 6)), ((1, 2), (3, 3))])
def test_interpolation_against_loops(source, grid):
    table = patches.position_embedding(source, 8).reshape(*source, 8).astype(np.float64)
    expected = slow_bicubic(table, grid).reshape(-1, 8)
    np.testing.assert_allclose(patches.position_embedding(grid, 8, source), expected, rtol=0, atol=1e-6)


def test_interpolation_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    table = patches.position_embedding((14, 14), 16).reshape(1, 14, 14, 16)
    stretched = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(0, 3, 1, 2), size=(30, 40), mode="bicubic", align_corners=False
    )
    expected = stretched.permute(0, 2, 3, 1).numpy().reshape(-1, 16)
    np.testing.assert_allclose(patches.position_embedding((30, 40), 16, (14, 14)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "vit"])
def test_the_encoder_takes_the_choice(kind):
    """Same features at the grid of pretraining, others elsewhere, and a table of other values is what differs."""
    config = InfMAEConfig().replace(kind=kind, position_grid=(2, 3), **TINY)
    stretched = config.replace(position="interpolate")
    images = np.random.default_rng(0).standard_normal((1, 64, 80, 1)).astype(np.float32)
    params = {"params": randomised(InfMAE(config), images, np.array([[0]], np.int32))}

    @jax.jit
    def stage3(images):
        return [InfMAE(c).apply(params, images, method="features")["stage3"] for c in (config, stretched)]

    np.testing.assert_array_equal(*stage3(images[:, :32, :48]))
    assert np.abs(np.subtract(*stage3(images))).max() > 0.1


@pytest.mark.parametrize("change, message", [
    (dict(position="learned"), "position='learned' must be one of recompute, interpolate"),
    (dict(position_grid=(14, 0)), "position_grid=.14, 0. must be token rows, columns"),
])  # fmt: skip
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        InfMAEConfig().replace(**change)
