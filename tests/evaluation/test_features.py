import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.augment import resize
from data_pipelines.errors import InputError
from infmae_jax.evaluation import features as module
from infmae_jax.interop.load import untrained
from infmae_jax.evaluation.features import FeatureExtractor, Views
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import normalize
from tests.evaluation.conftest import SIZE

VIEWS = Views(SIZE)


@pytest.fixture
def files(labelled):
    return sorted((labelled.parent / "images").iterdir())


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, as they are."""
    seen = []
    original = module.read_image_file
    monkeypatch.setattr(module, "read_image_file", lambda path, how: (seen.append(path), original(path, how))[1])
    return seen


def one_by_one(encoder, files, **options):
    """Feature maps of each image alone: no batches, no padding, no threads."""
    model = InfMAE(encoder.config)
    for file in files:
        pixels = resize(np.asarray(Image.open(file)), encoder.image_size)
        images = normalize(pixels[None, :, :, None])
        yield model.apply({"params": encoder.params}, images, method="features", **options)


def test_batches_threads_and_padding_do_not_change_features(small_encoder, files):
    want = np.stack([maps["pooled"][0] for maps in one_by_one(small_encoder, files)])
    got = FeatureExtractor(small_encoder, batch_size=8, threads=3).extract(files, VIEWS)
    assert (got.shape, got.dtype) == ((30, 1, 16), np.float32)
    np.testing.assert_allclose(got[:, 0], want, atol=2e-5)


def test_a_few_images_at_once_have_the_same_features(small_encoder):
    images = np.random.default_rng(0).integers(0, 256, (12, *SIZE, 1), np.uint8)
    whole, pieces = (module.encode(small_encoder.config, small_encoder.params, images, n) for n in (12, 4))
    assert whole.keys() == pieces.keys()
    for name in whole:
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "batch, platforms, expected",
    [
        (64, ["cpu"], 8), (20, ["cpu"], 5), (6, ["cpu"], 6), (61, ["cpu"], 61), (64, ["cpu", "cpu"], 64),
        (64, ["gpu"], 64),
    ],
)  # fmt: skip
def test_how_many_images_at_once(batch, platforms, expected):
    assert module.images_at_once(batch, [SimpleNamespace(platform=name) for name in platforms]) == expected


def test_every_feature_is_what_its_name_says(small_encoder, files):
    extractor = FeatureExtractor(small_encoder, batch_size=4)
    maps = list(one_by_one(small_encoder, files[:6]))
    stages = ("stage1", "stage2", "stage3")
    means = {name: np.stack([np.mean(m[name][0], axis=(0, 1)) for m in maps]) for name in stages}
    fused = np.stack([m["pooled"][0] for m in one_by_one(small_encoder, files[:6], fuse_stages=True)])
    for name, want in {**means, "multi": np.concatenate(list(means.values()), axis=1), "fused": fused}.items():
        np.testing.assert_allclose(extractor.extract(files[:6], VIEWS, name)[:, 0], want, atol=2e-5, err_msg=name)


def test_plain_vit_has_pooled_tokens_only(small_model, files):
    encoder = untrained(small_model.replace(kind="vit"), SIZE)
    extractor = FeatureExtractor(encoder, batch_size=4)
    want = np.stack([m["pooled"][0] for m in one_by_one(encoder, files[:3])])
    np.testing.assert_allclose(extractor.extract(files[:3], VIEWS)[:, 0], want, atol=2e-5)
    with pytest.raises(InputError, match="'stage1' is not one of pooled, stage3"):
        extractor.extract(files[:3], VIEWS, "stage1")


def test_finished_features_are_not_computed_again(small_encoder, files, tmp_path, decoded):
    first = FeatureExtractor(small_encoder, cache=tmp_path / "cache").extract(files, VIEWS)
    assert sorted(decoded) == files
    again = FeatureExtractor(small_encoder, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.extract(files, VIEWS), first)
    again.extract(files, VIEWS, "multi")
    assert len(decoded) == len(files)


@pytest.mark.parametrize("change", ["weights", "file", "list", "size"])
def test_features_are_computed_again_when_something_changed(
    small_encoder, other_encoder, files, tmp_path, decoded, change
):
    FeatureExtractor(small_encoder, cache=tmp_path).extract(files, VIEWS)
    decoded.clear()
    encoder, views = small_encoder, VIEWS
    if change == "weights":
        encoder = other_encoder
    elif change == "file":
        os.utime(files[3], ns=(1, 1))
    elif change == "list":
        files = files[::-1]
    else:
        views = dataclasses.replace(VIEWS, size=(32, 32))
    FeatureExtractor(encoder, cache=tmp_path).extract(files, views)
    assert len(decoded) == len(files)


def test_an_interrupted_extraction_goes_on_where_it_was(small_encoder, files, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(module, "_BATCHES_PER_PART", 2)
    good = files[25].read_bytes()
    want = FeatureExtractor(small_encoder, batch_size=4).extract(files, VIEWS)
    files[25].write_bytes(b"no image")
    with pytest.raises(InputError, match=files[25].name):
        FeatureExtractor(small_encoder, batch_size=4, cache=tmp_path / "bad").extract(files, VIEWS)
    assert not list((tmp_path / "bad").rglob("*.tmp"))

    # The same with an error that is not the file's: everything before the part of file 25 stays.
    files[25].write_bytes(good)
    original = module._read_views
    monkeypatch.setattr(module, "_read_views", lambda f, i, *v: 1 / 0 if i == 25 else original(f, i, *v))
    with pytest.raises(ZeroDivisionError):
        FeatureExtractor(small_encoder, batch_size=4, cache=tmp_path / "cache").extract(files, VIEWS)
    monkeypatch.setattr(module, "_read_views", original)
    decoded.clear()
    got = FeatureExtractor(small_encoder, batch_size=4, cache=tmp_path / "cache").extract(files, VIEWS)
    np.testing.assert_array_equal(got, want)
    assert sorted(decoded) == files[24:]


def test_diverged_weights_are_named(small_encoder, files):
    params = {"encoder": {**small_encoder.params["encoder"]}}
    params["encoder"]["norm"] = {"scale": np.full(16, np.nan, np.float32), "bias": np.zeros(16, np.float32)}
    with pytest.raises(InputError, match="not finite"):
        FeatureExtractor(dataclasses.replace(small_encoder, params=params)).extract(files, VIEWS)


def test_views_of_training_images():
    image = np.random.default_rng(0).integers(0, 256, (50, 70)).astype(np.uint8)
    views = Views(SIZE, flip=True, crops=3)
    got = views.of(image, 5)
    assert (got.shape, got.dtype, views.count) == ((5, *SIZE), np.uint8, 5)
    np.testing.assert_array_equal(got[1], got[0][:, ::-1])
    np.testing.assert_array_equal(got, views.of(image, 5))
    assert (got[2:] != views.of(image, 6)[2:]).any() and (got[2] != got[3]).any()


def test_stretching_keeps_the_rim_and_the_centre_crop_does_not():
    image = np.zeros((60, 100), np.uint8)
    image[:, :4] = 255
    assert Views((48, 48)).of(image, 0)[0][:, 0].mean() > 200
    assert Views((48, 48), stretch=False).of(image, 0).max() == 0
