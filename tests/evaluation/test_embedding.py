"""Embeddings of images by a frozen encoder."""

import numpy as np

from infmae_jax.evaluation.embedding import embedding_of
from tests.data_pipelines.planted import synthetic_scenes


def test_embedding_of_an_image_does_not_depend_on_its_company(small_encoder):
    embed = embedding_of(small_encoder)
    images = synthetic_scenes(34, 0) + [synthetic_scenes(1, 1)[0][:100, :50]]
    vectors = embed(images)
    assert vectors.shape == (35, 16) and np.isfinite(vectors).all()
    np.testing.assert_allclose(embed(images[33:]), vectors[33:], atol=1e-5)
    np.testing.assert_allclose(embed([images[3]] * 2), vectors[[3, 3]], atol=1e-5)
