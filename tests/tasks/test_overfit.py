"""With --long: each task learns a handful of images by heart, through the loop that trains."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.synthetic import write_shards
from data_pipelines.transforms import InfraredAugment
from infmae_jax.models.config import SegmentationHeadConfig, SmallTargetHeadConfig
from infmae_jax.training import loop
from tests.tasks.cases import task_of

SIZE = (96, 96)
HEADS = {
    "segment": SegmentationHeadConfig(channels=48, auxiliary_channels=16, dropout=0.0),
    "small_target": SmallTargetHeadConfig(widths=(32, 24, 16, 16, 16)),
}


@pytest.mark.parametrize(("kind", "images", "steps", "measure", "least"), [
    ("segment", 8, 700, "mIoU", 0.95), ("small_target", 16, 900, "IoU", 0.9),
])  # fmt: skip
def test_a_few_images_are_learned_by_heart(kind, images, steps, measure, least, encoder, tmp_path, request):
    if not request.config.getoption("--long"):
        pytest.skip("takes a minute: --long")
    mask = "surfaces" if kind == "segment" else "targets"
    write_shards(tmp_path / mask, -(-images * 4 // 3), size=SIZE, mask=mask)  # a quarter of them is val
    exact = dict(image_size=SIZE, zoom=(1.0, 1.0), focus=0.0, flip=False, augment=InfraredAugment(), batch_size=8)
    task, config = task_of(kind, encoder, tmp_path, data=exact, duration=f"{steps} steps", head=HEADS[kind],
                           evaluate_every="0 steps", checkpoint_every="0 steps", layer_decay=1.0)  # fmt: skip
    config = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, drop_path=0.0),
        optimizer=dataclasses.replace(config.optimizer, base_learning_rate=0.1, warmup="20 steps", weight_decay=0.0),
    )  # fmt: skip
    task = type(task)(config, task.trained)
    params = jax.device_get(loop.train(task, config, tmp_path / "run").state.params)
    scores = task.model.evaluate(params, config.data.shards, "train")["scores"]
    print({name: value for name, value in scores.items() if isinstance(value, float)})
    assert scores["images"] == images and scores[measure] > least
    assert not np.isnan(scores[measure])
