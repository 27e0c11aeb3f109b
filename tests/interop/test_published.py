"""Published state dicts: every tensor is used or named in an error; masks, heads and positions survive both ways."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig, select_visible, token_scores
from infmae_jax.interop import names, published
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import InfMAE
from tests.interop.published_format import TINY, TINY_HEADS, random_state

ARCHITECTURES = [
    variant("tiny"),
    variant("base"),
    variant("tiny", kind="vit"),
    variant("tiny", fuse_stages=False, in_channels=1, depths=(1, 3, 2)),
]


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_table_covers_every_parameter_once(config):
    images, ids_keep = np.zeros((1, 32, 32, 1), np.float32), np.zeros((1, 1), np.int32)
    shapes = jax.eval_shape(InfMAE(config).init, jax.random.key(0), images, ids_keep)["params"]
    entries = names.table(config)
    assert sorted(entry.path for entry in entries) == sorted(traverse_util.flatten_dict(shapes))
    assert len({entry.name for entry in entries}) == len(entries)


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_layouts_are_inverse(config):
    for entry in names.table(config):
        ours = np.arange(np.prod(entry.ours), dtype=np.float32).reshape(entry.ours)
        there = entry.publish(ours)
        assert there.shape == entry.shape
        np.testing.assert_array_equal(entry.adopt(there), ours)


def test_layouts_by_index():
    """ours[...] and published[...] name the same weight: (rows, columns, in, out) against (out, in, rows, columns)."""
    entries = {
        ".".join(entry.path[1:-1]): entry for entry in names.table(variant("tiny")) if entry.path[-1] == "kernel"
    }

    def both(name):
        ours = np.arange(np.prod(entries[name].ours)).reshape(entries[name].ours)
        return ours, entries[name].publish(ours)

    conv, published_conv = both("patch_embed1.proj")
    assert published_conv[6, 2, 1, 3] == conv[1, 3, 2, 6] and published_conv.shape == (48, 3, 4, 4)
    depthwise, published_depthwise = both("blocks1_0.dwconv")
    assert published_depthwise[4, 0, 1, 3] == depthwise[1, 3, 4] and published_depthwise.shape == (48, 1, 5, 5)
    pointwise, published_pointwise = both("blocks2_1.conv1")
    assert published_pointwise[5, 2, 0, 0] == pointwise[2, 5] and published_pointwise.shape == (96, 96, 1, 1)
    linear, published_linear = both("blocks3_0.mlp.fc1")
    assert published_linear[5, 2] == linear[2, 5] and published_linear.shape == (768, 192)


@pytest.mark.parametrize("mae", [False, True])
@pytest.mark.parametrize("grid", [(14, 14), (2, 6), (6, 2), (3, 3)])
def test_round_trip_changes_nothing(mae, grid):
    state = random_state(TINY, mae, grid)
    checkpoint = published.from_state(state, **TINY_HEADS, norm_pix_loss=True)
    model = checkpoint.config
    assert checkpoint.image_size == (grid[0] * 16, grid[1] * 16)
    encoder = model.encoder
    assert (encoder.kind, encoder.widths[-1], encoder.depths[-1]) == ("vit" if mae else "hybrid", 16, 3)
    assert (model.encoder.heads, model.decoder.heads, model.norm_pix_loss) == (4, 4, True)
    back, metadata = published.to_state(checkpoint)
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert back[name].tobytes() == array.tobytes() and back[name].shape == array.shape, name
    again = published.from_state(back, metadata)
    assert (again.config, again.mask, again.image_size) == (checkpoint.config, checkpoint.mask, checkpoint.image_size)


def test_heads_are_the_published_ones_by_default():
    state = random_state({**TINY, "widths": (8, 12, 24)})
    model = published.from_state(state).config
    assert (model.encoder.heads, model.decoder.heads, model.norm_pix_loss) == (12, 16, False)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype):
    state = {name: array.astype(dtype) for name, array in random_state(TINY).items()}
    checkpoint = published.from_state(state, **TINY_HEADS)
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params)} == {np.dtype(np.float32)}


def test_imported_masks_follow_the_scoring_convolution():
    """Ids of the host's kernel against the published rule computed with all filters."""
    state = random_state(TINY, grid=(4, 6))
    mask = published.from_state(state, **TINY_HEADS).mask
    assert (mask.score, mask.selection, mask.stride, mask.descending) == ("kernel", "stride", 4, False)
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 96), np.uint8)
    scores = filter_means(state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], images)
    np.testing.assert_allclose(token_scores(images, mask), scores, atol=1e-5)
    np.testing.assert_array_equal(select_visible(token_scores(images, mask), mask), np.argsort(scores)[:, ::4])


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("score", ["gray_mean", "kernel"])
def test_exported_scoring_convolution_keeps_the_masks(score, descending):
    rng = np.random.default_rng(2)
    kernel = tuple(tuple(map(tuple, row)) for row in rng.normal(size=(16, 16, 3)).tolist()) if score == "kernel" else ()
    mask = MaskConfig(score=score, kernel=kernel, bias=0.5 * bool(kernel), descending=descending)
    config = variant("tiny")
    weight, bias = published.score_filters(config, mask)
    assert weight.shape == (config.encoder.widths[-1], 3, 16, 16) and bias.shape == (config.encoder.widths[-1],)
    images = rng.integers(0, 256, (2, 64, 64), np.uint8)
    kept = select_visible(token_scores(images, mask), mask)
    np.testing.assert_array_equal(np.argsort(filter_means(weight, bias, images), kind="stable")[:, ::4], kept)


def filter_means(weight, bias, images):
    """Channel mean of a 16 x 16, stride 16 convolution over normalised images repeated to three channels."""
    normalised = (images / 255.0 - 0.425) / 0.200
    batch, height, width = images.shape
    out = np.zeros((batch, height // 16, width // 16))
    for row in range(height // 16):
        for column in range(width // 16):
            patch = normalised[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            responses = np.einsum("dcij,bij->bd", weight.astype(np.float64), patch) + bias
            out[:, row, column] = responses.mean(axis=1)
    return out.reshape(batch, -1)


def without(state, *prefixes):
    return {name: array for name, array in state.items() if not name.startswith(prefixes)}


def refusal(state, **architecture):
    with pytest.raises(InputError) as refused:
        published.from_state(state, **(TINY_HEADS | architecture))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("mae", [False, True])
def test_a_missing_tensor_is_named(mae):
    state = random_state(TINY, mae, grid=(2, 2))
    for name in [*list(state)[::12], "pos_embed", "mask_token", "patch_embed.proj.bias", "decoder_embed.weight"]:
        message = refusal({key: array for key, array in state.items() if key != name})
        assert name in message, message


def test_extra_and_misshaped_tensors_are_named():
    state = random_state(TINY, grid=(2, 2))
    assert "1 unknown: head.weight" in refusal(state | {"head.weight": np.zeros((7, 16), np.float32)})
    bad = state | {"blocks2.0.conv1.weight": np.zeros((12, 11, 1, 1), np.float32)}
    assert "blocks2.0.conv1.weight (12, 11, 1, 1), not (12, 12, 1, 1)" in refusal(bad)
    counts = state | {"norm.bias": np.zeros(16, np.int64)}
    assert "integers" in refusal(counts) and "norm.bias" in refusal(counts)


def test_half_the_tensors_missing_is_one_line():
    state = random_state(TINY, grid=(2, 2))
    half = dict(list(state.items())[::2])
    assert "missing" in refusal(half)
    first = dict(list(state.items())[: len(state) // 2])
    assert "missing" in refusal(first)


def test_other_architectures():
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32), "layer1.0.bn1.weight": np.zeros(64, np.float32)}
    assert "not the state dict of an InfMAE or MAE model" in refusal(resnet)
    swin = {
        "patch_embed.proj.weight": np.zeros((96, 3, 4, 4), np.float32),
        "layers.0.blocks.0.norm1.weight": np.ones(96),
    }
    assert "not the state dict" in refusal(swin)
    half = without(random_state(TINY, mae=True), "decoder_embed")
    assert "decoder_embed.weight is missing" in refusal(half)


def test_made_up_block_numbers_are_refused_quickly():
    state = random_state(TINY, grid=(2, 2))
    assert "missing" in refusal(state | {"blocks3.9999.norm1.weight": np.zeros(16, np.float32)})


def test_positions_that_are_not_the_fixed_ones():
    state = random_state(TINY)
    state["pos_embed"] = state["pos_embed"] + np.float32(0.01)
    assert "not the fixed sin-cos position embeddings" in refusal(state)


def test_heads_that_do_not_divide():
    assert "attention heads; give the checkpoint's own --heads" in refusal(random_state(TINY), heads=7)


def test_damaged_metadata():
    for metadata in ("{", "[]", '{"model": {"heads": "many"}}', '{"model": {}, "mask": {"score": 1}}'):
        with pytest.raises(InputError, match="entry is damaged"):
            published.from_state(random_state(TINY), metadata)


def test_an_encoder_alone_cannot_be_published():
    checkpoint = published.from_state(random_state(TINY), **TINY_HEADS)
    encoder = dataclasses.replace(checkpoint, params={"encoder": checkpoint.params["encoder"]})
    with pytest.raises(InputError, match="lacks decoder_.*: convert it with --to=jax-export, or the run that"):
        published.to_state(encoder)
