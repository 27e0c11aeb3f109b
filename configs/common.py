"""What configs share: the `:smoke` form, a CPU-sized run of the same code."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from infmae_jax.evaluation.windows import Windows
from infmae_jax.tasks.finetune import EmbeddedLabels, FineTuneConfig
from infmae_jax.tasks.pretrain import EmbeddedConfig, PretrainConfig
from infmae_jax.training.config import to_config

_SMOKE_MODEL = dict(widths=(16, 24, 32), depths=(1, 1, 2), heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)

_SMOKE_HEADS = {
    "detect": dict(
        channels=16, box_channels=32, box_convs=1, mask_convs=1, pre_nms_train=64, pre_nms_test=64, proposals_train=64,
        proposals_test=32, rpn_samples=64, rois=32, max_candidates=64, max_detections=20,
    ),
    "segment": dict(channels=16, auxiliary_channels=8),
    "small_target": dict(widths=(16, 8, 8, 8, 8)),
}  # fmt: skip


def check_argument(arg: str) -> bool:
    """True for "smoke", False for ""; ValueError for anything else after the colon of --config=FILE.py:ARG."""
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument {arg!r} is unknown: use FILE.py, or FILE.py:smoke for a CPU-sized run")
    return arg == "smoke"


def pretrain(config: PretrainConfig, arg: str) -> ConfigDict:
    """The config as ConfigDict, shrunk to seconds of CPU time when `arg` is "smoke"."""
    return to_config(_smoke(config) if check_argument(arg) else config)


def _smoke(config: PretrainConfig) -> PretrainConfig:
    return dataclasses.replace(
        config,
        model=config.model.replace(**_SMOKE_MODEL),
        data=dataclasses.replace(config.data, image_size=(64, 64), batch_size=8, workers=0),
        optimizer=dataclasses.replace(config.optimizer, warmup="2 steps"),
        duration="6 steps",
        log_every="1 steps",
        checkpoint_every="3 steps",
        picture_every="3 steps",
        embedded=EmbeddedConfig(images=24, height=96, width=128, probe_images=config.embedded.probe_images and 24),
    )


def finetune(config: FineTuneConfig, arg: str) -> ConfigDict:
    """As `pretrain`; the smoke form trains the tiny variant's encoder on a few synthetic scenes."""
    if not check_argument(arg):
        return to_config(config)
    small = dataclasses.replace(
        config,
        variant="",
        encoder=dataclasses.replace(config.encoder, dtype="float32"),
        head=dataclasses.replace(config.head, **_SMOKE_HEADS[config.task]),
        data=dataclasses.replace(config.data, image_size=(64, 64), batch_size=8, workers=0, shards=()),
        windows=Windows((0, 0), batch_size=1),
        optimizer=dataclasses.replace(config.optimizer, warmup="2 steps"),
        duration="6 steps",
        log_every="1 steps",
        checkpoint_every="3 steps",
        evaluate_every="3 steps",
        embedded=EmbeddedLabels(images=24, height=96, width=128),
    )
    return to_config(small)
