"""Duplicate search: the anchor rule against a slow reference, the fingerprints' promises, planted copies found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft, ndimage

from data_pipelines.prepare.duplicates import DuplicateRule, find_near_duplicates, fingerprint_image
from tests.data_pipelines.planted import real_scenes, search_planted, synthetic_scenes


def slow_anchor_rule(codes, features, rule):
    """The rule as it is worded: one image after the other, every kept one an anchor."""
    anchors, removed = [], {}
    for image in range(len(codes)):
        best = None
        for anchor in anchors:
            bits = bin(int(codes[image]) ^ int(codes[anchor])).count("1")
            similarity = float(features[image].astype(np.float32) @ features[anchor].astype(np.float32))
            if bits <= rule.radius and similarity > rule.threshold:
                if best is None or similarity > best[1] + 1e-6:
                    best = anchor, similarity
        if best is None:
            anchors.append(image)
        else:
            removed[image] = best[0]
    return removed


def clustered_prints(seed, count, clusters):
    """Hashes and features scattered around a few centres, so that chains and ties of scenes occur."""
    rng = np.random.default_rng(seed)
    members = rng.integers(clusters, size=count)
    bits = rng.integers(0, 2, (clusters, 64))[members] ^ (rng.random((count, 64)) < rng.choice([0, 0.05, 0.12]))
    codes = np.packbits(bits.astype(np.uint8), axis=1).view(np.uint64)[:, 0]
    features = rng.standard_normal((clusters, 16))[members] + rng.choice([0.1, 0.4]) * rng.standard_normal((count, 16))
    return codes, (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 12))
def test_anchor_rule_against_slow_reference(seed, count, clusters):
    codes, features = clustered_prints(seed, count, clusters)
    rule = DuplicateRule(radius=12, threshold=0.9)
    near = enumerate(find_near_duplicates(codes, features, rule))
    found = {index: (anchor, similarity) for index, (anchor, similarity) in near if anchor != index}
    slow = slow_anchor_rule(codes, features, rule)
    assert list(found) == sorted(slow)
    for index, (anchor, similarity) in found.items():  # equally similar anchors differ in the last bit, by the sum
        best = float(features[index].astype(np.float32) @ features[slow[index]].astype(np.float32))
        assert anchor == slow[index] or abs(similarity - min(best, 1.0)) < 2e-6
    assert not found.keys() & {anchor for anchor, _ in found.values()}


def test_every_image_is_answered_for():
    codes, features = clustered_prints(1, 150, 4)
    assert len(list(find_near_duplicates(codes, features, DuplicateRule()))) == 150


def test_fingerprint_is_that_of_the_filtered_thumbnail():
    image = synthetic_scenes(1, 5)[0]
    blocks = image[: 256 // 32 * 32, : 320 // 32 * 32].reshape(32, 8, 32, 10).mean((1, 3))
    code, feature = fingerprint_image(image)
    low = fft.dctn(blocks, norm="ortho")[:8, :8].ravel()
    low[0] = 0
    bits = np.unpackbits(np.array([code], "<u8").view(np.uint8), bitorder="little").astype(bool)
    assert np.mean(bits == (low > np.median(low[1:]))) > 0.95  # thumbnails are rounded to gray levels

    cells = blocks.reshape(16, 2, 16, 2).mean((1, 3))
    # By the filter's gain at each frequency of the cosine transform, whose edges are mirrored as well.
    frequency = np.pi * np.arange(16) / 16
    curvature, gaussian = 2 * np.cos(frequency) - 2, np.exp(-0.5 * frequency**2)
    gain = np.add.outer(curvature, curvature) * np.outer(gaussian, gaussian)
    expected = fft.idctn(fft.dctn(cells, norm="ortho") * gain, norm="ortho").ravel()
    cosine = (feature.astype(float) @ expected) / np.linalg.norm(expected)
    assert cosine > 0.995 and np.linalg.norm(feature.astype(float)) == pytest.approx(1, abs=1e-3)


@given(st.integers(0, 2**32), st.floats(0.3, 3.0), st.integers(-50, 50))
@settings(deadline=None, max_examples=20)
def test_fingerprint_ignores_gain_and_offset(seed, gain, offset):
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.random((60, 80)) * 20_000, 5) + 100
    code, feature = fingerprint_image(image.astype(np.uint16))
    other_code, other_feature = fingerprint_image((image * gain + offset).astype(np.uint16))
    assert int(np.bitwise_count(code ^ other_code)) <= 2
    assert feature.astype(float) @ other_feature.astype(float) > 0.99


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 3), (33, 31)])
def test_any_shape_has_a_fingerprint(shape):
    _, feature = fingerprint_image(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    assert np.isfinite(feature).all()
    assert np.isfinite(fingerprint_image(np.full(shape, 7, np.uint8))[1]).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_copies_of_synthetic_scenes_are_found(seed):
    recall, false_removals = search_planted(synthetic_scenes(60, seed), [], DuplicateRule(), seed)
    assert min(recall.values()) > 0.95, recall
    assert false_removals < 0.01


def test_planted_copies_of_real_images_are_found(shared_folder):
    recall, false_removals = search_planted(*real_scenes(shared_folder / "data", 11), DuplicateRule(), 11)
    assert np.mean(list(recall.values())) > 0.95, recall
    assert false_removals < 0.01
