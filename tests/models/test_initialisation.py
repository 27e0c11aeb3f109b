"""Initial weights follow the published distributions: bounds, mean and variance of every kind of layer."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE

WIDTHS, MLP_RATIO = (32, 48, 96), 4
HYBRID = InfMAEConfig().replace(
    widths=WIDTHS, depths=(1, 1, 1), heads=6, mlp_ratio=MLP_RATIO, decoder_width=64, decoder_depth=1, decoder_heads=4
)


def xavier(fan_in, fan_out):
    return "uniform", math.sqrt(6.0 / (fan_in + fan_out))


def torch_default(fan_in):
    """PyTorch's convolutions: kernel and bias uniform within 1/sqrt(fan_in)."""
    return "uniform", 1.0 / math.sqrt(fan_in)


ZEROS, ONES, TOKEN = ("constant", 0.0), ("constant", 1.0), ("normal", 0.02)
W1, W2, W3 = WIDTHS


def norm(path):
    return {f"{path}/scale": ONES, f"{path}/bias": ZEROS}


def linear(path, fan_in, fan_out):
    return {f"{path}/kernel": xavier(fan_in, fan_out), f"{path}/bias": ZEROS}


def convolution(path, fan_in, kernel=None):
    return {f"{path}/kernel": kernel or torch_default(fan_in), f"{path}/bias": torch_default(fan_in)}


def conv_block(path, width):
    hidden = MLP_RATIO * width
    layers = {"conv1": width, "conv2": width, "dwconv": 25, "mlp/fc1": width, "mlp/fc2": hidden}
    convolutions = [convolution(f"{path}/{layer}", fan_in) for layer, fan_in in layers.items()]
    return merge(norm(f"{path}/norm1"), norm(f"{path}/norm2"), *convolutions)


def transformer_block(path, width):
    hidden = MLP_RATIO * width
    layers = {
        "attn/qkv": (width, 3 * width),
        "attn/proj": (width, width),
        "mlp/fc1": (width, hidden),
        "mlp/fc2": (hidden, width),
    }
    linears = [linear(f"{path}/{layer}", *fans) for layer, fans in layers.items()]
    return merge(norm(f"{path}/norm1"), norm(f"{path}/norm2"), *linears)


def merge(*parts):
    return functools.reduce(dict.__or__, parts)


DECODER = merge(
    linear("decoder/embed", W3, 64),
    {"decoder/mask_token": TOKEN},
    transformer_block("decoder/blocks_0", 64),
    norm("decoder/norm"),
    linear("decoder/pred", 64, 768),
)
EXPECTED = {
    "hybrid": merge(
        convolution("encoder/patch_embed1/proj", 16 * 3),
        convolution("encoder/patch_embed2/proj", 4 * W1),
        convolution("encoder/patch_embed3/proj", 4 * W2, kernel=xavier(4 * W2, W3)),
        *(norm(f"encoder/patch_embed{stage}/norm") for stage in (1, 2, 3)),
        linear("encoder/patch_embed4", W3, W3),
        conv_block("encoder/blocks1_0", W1),
        conv_block("encoder/blocks2_0", W2),
        transformer_block("encoder/blocks3_0", W3),
        convolution("encoder/stage1_output_decode", 16 * W1),
        convolution("encoder/stage2_output_decode", 4 * W2),
        norm("encoder/norm"),
        DECODER,
    ),
    "vit": merge(
        convolution("encoder/patch_embed", 256 * 3, kernel=xavier(256 * 3, W3)),
        {"encoder/cls_token": TOKEN},
        transformer_block("encoder/blocks_0", W3),
        norm("encoder/norm"),
        DECODER,
    ),
}
INDEPENDENT_SEEDS = 6  # pooled, so that small biases have enough samples


@functools.cache
def initial_weights(encoder):
    """Path -> flat samples of several initialisations."""
    config = HYBRID.replace(kind=encoder)
    images, ids_keep = np.zeros((1, 32, 32, 1), np.float32), np.zeros((1, 1), np.int32)
    init = jax.jit(InfMAE(config).init)
    trees = [init(jax.random.key(seed), images, ids_keep)["params"] for seed in range(INDEPENDENT_SEEDS)]
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in trees]
    return {path: np.concatenate([np.ravel(tree[path]) for tree in flat]) for path in flat[0]}


@pytest.mark.parametrize("encoder", EXPECTED)
def test_every_parameter_has_a_stated_distribution(encoder):
    assert initial_weights(encoder).keys() == EXPECTED[encoder].keys()


@pytest.mark.parametrize(("encoder", "path"), [(encoder, path) for encoder in EXPECTED for path in EXPECTED[encoder]])
def test_distribution(encoder, path):
    samples, (kind, value) = initial_weights(encoder)[path].astype(np.float64), EXPECTED[encoder][path]
    if kind == "constant":
        np.testing.assert_array_equal(samples, value)
        return
    deviation = value / math.sqrt(3.0) if kind == "uniform" else value
    kurtosis = 9 / 5 if kind == "uniform" else 3.0
    count = len(samples)
    assert abs(samples.mean()) < 5 * deviation / math.sqrt(count)
    variance_error = abs(samples.var() / deviation**2 - 1)
    assert variance_error < 5 * math.sqrt((kurtosis - 1) / count)
    largest = np.abs(samples).max()
    if kind == "uniform":
        assert largest <= value * (1 + 1e-6)
        assert largest > value * (1 - 20 / count)  # the bound is reached, as far as chance allows
    else:
        assert largest > 2 * value
