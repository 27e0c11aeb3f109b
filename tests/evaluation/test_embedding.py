"""Embeddings of images by a frozen encoder, and near-duplicates that it must confirm."""

import numpy as np
from PIL import Image

from data_pipelines.duplicates import DuplicateRule
from data_pipelines.prepare import PrepareConfig, prepare
from infmae_jax.evaluation.embedding import embedding_of
from tests.data_pipelines.planted import synthetic_scenes


def test_embedding_of_an_image_does_not_depend_on_its_company(small_encoder):
    embed = embedding_of(small_encoder)
    images = synthetic_scenes(34, 0) + [synthetic_scenes(1, 1)[0][:100, :50]]
    vectors = embed(images)
    assert vectors.shape == (35, 16) and np.isfinite(vectors).all()
    np.testing.assert_allclose(embed(images[33:]), vectors[33:], atol=1e-5)
    np.testing.assert_allclose(embed([images[3]] * 2), vectors[[3, 3]], atol=1e-5)


def test_encoder_can_veto_near_duplicates(small_encoder, tmp_path):
    (tmp_path / "in").mkdir()
    for index, scene in enumerate(synthetic_scenes(4, 2)):
        Image.fromarray(scene).save(tmp_path / "in" / f"{index}a.png")
        Image.fromarray(np.rint(scene * 0.9 + 10).astype(np.uint8)).save(tmp_path / "in" / f"{index}b.png")

    def kept(name, embed, threshold):
        config = PrepareConfig(duplicates=DuplicateRule(), dedup_checkpoint=name, dedup_threshold=threshold)
        return prepare([tmp_path / "in"], tmp_path / name, config, workers=0, progress=False, embed=embed).kept

    assert kept("without", None, 0.85) == 4
    assert kept("agreeing", embedding_of(small_encoder), -1.0) == 4
    assert kept("vetoing", embedding_of(small_encoder), 1.0) == 8
