"""Masking against slow, one-token-at-a-time definitions, and against numbers computed elsewhere."""

import math
from collections import Counter

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.masking import (
    MaskConfig,
    mask_from_ids,
    num_visible,
    select_visible,
    token_grid,
    token_scores,
)
from data_pipelines.transforms import MEAN, STD

PATCH = 16


def _random_kernel(seed, channels=3):
    values = np.random.default_rng(seed).normal(size=(PATCH, PATCH, channels))
    return tuple(tuple(tuple(float(c) for c in column) for column in row) for row in values)


KERNEL = _random_kernel(0)


def _config(score, **changes):
    return MaskConfig(score=score, kernel=KERNEL if score == "kernel" else (), **changes)


def _slow_score(patch, score):
    values = [int(v) for v in patch.ravel()]
    count = len(values)
    if score == "gray_mean":
        return sum(values)
    if score == "variance":
        mean = sum(values) / count
        return sum((v - mean) ** 2 for v in values) / count
    if score == "entropy":
        return -sum(c / count * math.log2(c / count) for c in Counter(values).values())
    response = 0.7
    for row in range(PATCH):
        for column in range(PATCH):
            pixel = (int(patch[row, column]) / 255 - MEAN) / STD
            response += sum(KERNEL[row][column][c] * pixel for c in range(3))
    return response


def _slow_scores(image, score):
    return [
        _slow_score(image[top : top + PATCH, left : left + PATCH], score)
        for top in range(0, image.shape[0], PATCH)
        for left in range(0, image.shape[1], PATCH)
    ]


def _slow_order(scores, descending):
    return sorted(range(len(scores)), key=lambda token: (-scores[token] if descending else scores[token], token))


images = hypothesis.extra.numpy.arrays(
    np.uint8,
    st.tuples(st.integers(1, 3), st.sampled_from([16, 32, 48]), st.sampled_from([32, 64])),
    # Few distinct levels make ties, whose order is part of the definition.
    elements=st.sampled_from([0, 1, 2, 127, 254, 255]),
    fill=st.just(7),
)


@pytest.mark.parametrize("score", ["gray_mean", "variance", "entropy", "kernel"])
@hypothesis.given(images=images)
@hypothesis.settings(max_examples=25, deadline=None)
def test_scores_equal_the_definition(score, images):
    got = token_scores(images, _config(score, bias=0.7 if score == "kernel" else 0.0))
    for image, scores in zip(images, got, strict=True):
        expected = _slow_scores(image, score)
        if score == "gray_mean":
            assert scores.tolist() == expected
        else:
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("stride", [2, 3, 4, 7])
@hypothesis.given(images=images)
@hypothesis.settings(max_examples=15, deadline=None)
def test_gray_mean_stride_equals_the_definition_ties_included(images, stride, descending):
    config = MaskConfig(stride=stride, descending=descending)
    ids_keep = select_visible(token_scores(images, config), config)
    for image, ids in zip(images, ids_keep, strict=True):
        assert ids.tolist() == _slow_order(_slow_scores(image, "gray_mean"), descending)[::stride]


@pytest.mark.parametrize("selection", ["stride", "random", "top_k"])
@pytest.mark.parametrize("score", ["gray_mean", "variance", "entropy", "kernel"])
@hypothesis.given(images=images, keep=st.integers(0, 1), seed=st.integers(0, 9))
@hypothesis.settings(max_examples=10, deadline=None)
def test_every_sample_keeps_exactly_k_distinct_tokens(score, selection, images, keep, seed):
    config = _config(score, selection=selection, keep=0 if selection == "stride" else keep)
    scores = token_scores(images, config)
    num_tokens = scores.shape[-1]
    ids_keep = select_visible(scores, config, np.random.default_rng(seed))
    visible = num_visible(config, num_tokens)
    assert ids_keep.dtype == np.int32 and ids_keep.shape == (len(images), visible)
    assert all(len(set(ids.tolist())) == visible for ids in ids_keep)
    assert ids_keep.min() >= 0 and ids_keep.max() < num_tokens
    mask = mask_from_ids(ids_keep, num_tokens)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask.sum(-1), num_tokens - visible)
    np.testing.assert_array_equal(np.take_along_axis(mask, ids_keep, -1), 0)


@pytest.mark.parametrize("score", ["gray_mean", "variance", "entropy", "kernel"])
def test_batched_and_single_images_get_the_same_masks_and_samples_differ(score):
    images = np.random.default_rng(1).integers(0, 256, (5, 64, 96), dtype=np.uint8)
    config = _config(score)
    together = select_visible(token_scores(images, config), config)
    for image, ids in zip(images, together, strict=True):
        np.testing.assert_array_equal(select_visible(token_scores(image, config), config), ids)
    assert len({ids.tobytes() for ids in together}) == len(images)


@pytest.mark.parametrize("score", ["gray_mean", "variance", "entropy", "kernel"])
def test_equal_patches_tie_and_keep_their_order(score):
    patch = np.random.default_rng(2).integers(0, 256, (PATCH, PATCH), dtype=np.uint8)
    image = np.tile(patch, (4, 5))
    config = _config(score)
    np.testing.assert_array_equal(select_visible(token_scores(image, config), config), np.arange(0, 20, 4))


def test_permuted_gray_levels_tie_in_entropy():
    rng = np.random.default_rng(3)
    patch = rng.integers(0, 9, (PATCH, PATCH))
    relabelled = rng.permutation(256)[patch]
    scores = token_scores(np.hstack([patch, relabelled]).astype(np.uint8), _config("entropy"))
    assert scores[0] == scores[1]


def test_entropy_of_known_histograms():
    uniform = np.arange(256, dtype=np.uint8).reshape(PATCH, PATCH)
    halves = np.repeat(np.uint8([3, 200]), 128).reshape(PATCH, PATCH)
    constant = np.full((PATCH, PATCH), 9, np.uint8)
    np.testing.assert_array_equal(token_scores(np.hstack([uniform, halves, constant]), _config("entropy")), [8, 1, 0])


def test_top_k_keeps_the_highest_scores_in_order():
    config = MaskConfig(score="entropy", selection="top_k", keep=2)
    np.testing.assert_array_equal(select_visible(np.array([[0.5, 3.0, 1.0, 2.0]]), config), [[1, 3]])


def test_random_selection_is_uniform_and_depends_on_the_generator_alone():
    config = MaskConfig(score="none", selection="random", keep=3)
    image = np.zeros((32, 96), np.uint8)
    rng = np.random.default_rng(4)
    counts = np.zeros((3, 12))
    for _ in range(6000):
        counts[np.arange(3), select_visible(token_scores(image, config), config, rng)] += 1
    # 500 expected a cell, standard deviation 21: five of them is a one-in-a-million bound.
    assert np.abs(counts - 500).max() < 107
    draws = [select_visible(token_scores(image, config), config, np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("stride,num_tokens,expected", [(4, 196, 49), (4, 197, 50), (3, 196, 66), (8, 12, 2)])
def test_visible_tokens_round_up(stride, num_tokens, expected):
    assert num_visible(MaskConfig(stride=stride), num_tokens) == expected


@pytest.mark.parametrize("size", [(16, 17), (224, 200), (8, 8), (0, 16)])
def test_sizes_that_patches_do_not_fill_are_refused(size):
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}.*16"):
        token_grid(*size)
    with pytest.raises(InputError, match="16"):
        token_scores(np.zeros(size, np.uint8), MaskConfig())


@pytest.mark.parametrize(
    "bad,named",
    [
        ({"score": "grey"}, "grey"),
        ({"selection": "topk"}, "topk"),
        ({"score": "none"}, "random"),
        ({"stride": 0}, "stride"),
        ({"keep": 4}, "keep"),
        ({"score": "kernel"}, "kernel"),
        ({"score": "kernel", "kernel": KERNEL[:3]}, "kernel"),
    ],
)
def test_unusable_configs_are_named(bad, named):
    with pytest.raises(InputError, match=named) as caught:
        MaskConfig(**bad)
    assert "\n" not in str(caught.value)


def test_keeping_everything_is_refused():
    with pytest.raises(InputError, match="196 of 196"):
        num_visible(MaskConfig(stride=1), 196)


def test_published_masks_are_reproduced(shared_folder):
    golden = shared_folder / "golden" / "infmae_tiny"
    weights, expected = np.load(golden / "weights.npz"), np.load(golden / "activations.npz")
    kernel = weights["patch_embed.proj.weight"].astype(np.float64).mean(0).transpose(1, 2, 0)
    config = MaskConfig(
        score="kernel",
        descending=False,
        kernel=tuple(tuple(tuple(map(float, column)) for column in row) for row in kernel),
        bias=float(weights["patch_embed.proj.bias"].astype(np.float64).mean()),
    )
    scores = token_scores(expected["images_u8"][:4], config)
    np.testing.assert_allclose(scores, expected["score"], atol=2e-6)
    ids_keep = select_visible(scores, config)
    np.testing.assert_array_equal(ids_keep, expected["ids_keep"])
    np.testing.assert_array_equal(mask_from_ids(ids_keep, 196), expected["mask"])


def test_published_random_masks_are_the_smallest_noise(shared_folder):
    expected = np.load(shared_folder / "golden" / "mae_tiny" / "activations.npz")
    config = MaskConfig(selection="top_k", descending=False)
    np.testing.assert_array_equal(select_visible(expected["noise"], config), expected["ids_keep"])
