"""Features of labelled splits: what their names say, kept and found again."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.intensity import Intensity
from data_pipelines.prepare.labelled import prepare_table
from data_pipelines.transforms import resize
from data_pipelines.views import LabelledView
from infmae_jax.evaluation import features as module
from infmae_jax.evaluation.features import labelled_features
from infmae_jax.interop.load import untrained
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize
from tests.evaluation.conftest import SIZE

WHOLE = (LabelledView(SIZE, "stretch", flip=False), False)


@pytest.fixture
def shards(labelled, tmp_path):
    prepare_table(labelled, ["label"], tmp_path / "shards")
    return [str(tmp_path / "shards")]


def take(encoder, shards, tmp_path, feature="pooled", split="train", views=(WHOLE,), batch=8, label="label"):
    return labelled_features(encoder, shards, split, label, views, feature, batch, tmp_path / "cache")


def one_by_one(encoder, labelled, numbers, **options):
    for number in numbers:
        image = resize(np.asarray(Image.open(labelled.parent / "images" / f"{number:02d}.png")), SIZE)
        yield InfMAE(encoder.config).apply(
            {"params": encoder.params}, normalize(image[None, ..., None]), method="features", **options
        )


def test_features_of_a_split_are_those_of_its_images_in_order(small_encoder, labelled, shards, tmp_path):
    found = take(small_encoder, shards, tmp_path)
    want = np.stack([maps["pooled"][0] for maps in one_by_one(small_encoder, labelled, range(20))])
    assert (found.values.shape, found.values.dtype) == ((20, 1, 16), np.float32)
    np.testing.assert_allclose(found.values[:, 0], want, atol=2e-5)
    np.testing.assert_array_equal(found.classes, np.arange(20) % 2)
    assert [found.key(i) for i in (0, 19)] == ["images/00.png", "images/19.png"]


def test_every_feature_is_what_its_name_says(small_encoder, labelled, shards, tmp_path):
    maps = list(one_by_one(small_encoder, labelled, range(20, 26)))
    stages = ("stage1", "stage2", "stage3")
    means = {name: np.stack([np.mean(m[name][0], axis=(0, 1)) for m in maps]) for name in stages}
    fused = [m["pooled"][0] for m in one_by_one(small_encoder, labelled, range(20, 26), fuse_stages=True)]
    expected = {**means, "multi": np.concatenate(list(means.values()), axis=1), "fused": np.stack(fused)}
    for name, want in expected.items():
        found = take(small_encoder, shards, tmp_path, name, "val").values[:6, 0]
        np.testing.assert_allclose(found, want, atol=2e-5, err_msg=name)


def test_plain_vit_has_no_stages(small_model, shards, tmp_path):
    with pytest.raises(InputError, match="'stage1' is not one of pooled, stage3"):
        take(untrained(small_model.replace(kind="vit"), SIZE), shards, tmp_path, "stage1")


def test_views_of_training_images(small_encoder, shards, tmp_path):
    crop = (dataclasses.replace(WHOLE[0], whole="", flip=True), False)
    found = take(small_encoder, shards, tmp_path, views=(WHOLE, (WHOLE[0], True), crop, crop)).values
    assert found.shape == (20, 4, 16)
    assert all(np.abs(found[:, a] - found[:, b]).max() > 1e-4 for a in range(4) for b in range(a))


def test_what_is_finished_is_not_computed_again(small_encoder, other_encoder, shards, tmp_path, monkeypatch):
    first = take(small_encoder, shards, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "eval_batches", None)
        np.testing.assert_array_equal(take(small_encoder, shards, tmp_path).values, first.values)
    assert np.abs(take(other_encoder, shards, tmp_path).values - first.values).max() > 1e-3
    white = dataclasses.replace(small_encoder, intensity=Intensity("min_max"))
    assert np.abs(take(white, shards, tmp_path).values - first.values).max() > 1e-3


def test_mistakes_and_diverged_weights_are_named(small_encoder, shards, tmp_path):
    with pytest.raises(InputError, match="test"):
        take(small_encoder, shards, tmp_path, split="test")
    with pytest.raises(InputError, match="images/00.png.*no label 'colour'"):
        take(small_encoder, shards, tmp_path, label="colour")
    params = {"encoder": {**small_encoder.params["encoder"]}}
    params["encoder"]["norm"] = {"scale": np.full(16, np.nan, np.float32), "bias": np.zeros(16, np.float32)}
    with pytest.raises(InputError, match="not finite"):
        take(dataclasses.replace(small_encoder, params=params), shards, tmp_path)
