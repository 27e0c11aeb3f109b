import dataclasses
import json

import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.evaluation import probe as module
from infmae_jax.evaluation.features import FeatureExtractor, Views
from infmae_jax.evaluation.linear_probe import Recipe
from infmae_jax.evaluation.probe import ProbeConfig, linear_probe, table_text
from tests.evaluation.conftest import SIZE

RECIPE = Recipe(least_steps=200)


@pytest.fixture
def config(labelled):
    return ProbeConfig(csv=str(labelled), recipe=RECIPE, batch_size=8, neighbors=5)


def test_results_follow_from_the_saved_classifiers(small_encoder, config, labelled, tmp_path):
    result = linear_probe(small_encoder, config, tmp_path / "out")["label"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == result
    saved = np.load(tmp_path / "out/probe.npz")
    files = [labelled.parent / "images" / f"{i:02d}.png" for i in range(20, 30)]
    x = FeatureExtractor(small_encoder).extract(files, Views(SIZE))[:, 0]
    truth = np.arange(10) % 2
    correct = []
    for kernel, bias in zip(saved["kernel"], saved["bias"]):
        logits = (x - saved["mean"]) / np.sqrt(saved["variance"] + 1e-6) @ kernel + bias
        correct.append(np.mean(logits.argmax(1) == truth))
    assert list(saved["classes"]) == result["classes"] == ["cold", "hot"]
    assert result["top1"]["seeds"] == pytest.approx(correct)
    assert result["top1"]["mean"] == 1.0, "brightness separates these classes"
    assert np.sum(result["confusion"]) == 30
    assert result["majority_class"] == {"class": "cold", "top1": 0.5, "balanced_accuracy": 0.5}
    assert result["knn"]["top1"] == 1.0
    assert (tmp_path / "out/confusion_matrix.png").stat().st_size > 1000
    assert "100.0 ± 0.0" in table_text({"label": result})


def test_nothing_is_done_twice(small_encoder, config, tmp_path, monkeypatch):
    first = linear_probe(small_encoder, config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_heads", None)
        assert linear_probe(small_encoder, config, tmp_path) == first
    # Another recipe trains again, on the same features.
    monkeypatch.setattr("infmae_jax.evaluation.features.read_image_file", None)
    other = dataclasses.replace(config, recipe=dataclasses.replace(RECIPE, epochs=50))
    assert linear_probe(small_encoder, other, tmp_path) != first


def test_label_columns_share_features_and_have_a_folder_each(small_encoder, config, tmp_path):
    config = dataclasses.replace(config, label_column=("label", "angle"), seeds=1)
    results = linear_probe(small_encoder, config, tmp_path)
    assert results["angle"]["classes"] == ["0", "10", "20"]
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    written = {f"{c}/{f}" for c in ("label", "angle") for f in ("results.json", "probe.npz", "confusion_matrix.png")}
    assert written == {name for name in found if not name.startswith(("features/", "images/", "labels.csv"))}
    assert len([name for name in found if name.startswith("features/")]) == 2


def test_without_a_folder_nothing_is_written(small_encoder, config, labelled):
    before = sorted(labelled.parent.rglob("*"))
    result = linear_probe(small_encoder, dataclasses.replace(config, flip=True, crops=1))["label"]
    assert result["top1"]["mean"] == 1.0
    assert sorted(labelled.parent.rglob("*")) == before


@pytest.mark.parametrize("key, value", [("seeds", 0), ("crops", -1), ("view", "zoom"), ("label_column", ())])
def test_config_mistakes_are_named(key, value):
    with pytest.raises(InputError, match=f"config key {key}"):
        ProbeConfig(**{key: value})
