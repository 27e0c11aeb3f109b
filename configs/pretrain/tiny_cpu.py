"""Tiny variant on your own few thousand images, on the CPU of a laptop.

Command:   python -m infmae_jax.pretrain --config=configs/pretrain/tiny_cpu.py --workdir=RUN --config.data.shards=SHARDS
Hardware:  2 CPU cores
Hours:     0.7 for 3,046 images on 2 shared cores (35 to 48 images a second)
Result:    loss 1.44 -> 0.19; linear probes: configs/README.md
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    config = PretrainConfig(
        model=variant("tiny"),
        data=PipelineConfig(image_size=(160, 160), batch_size=64),
        optimizer=OptimizerConfig(base_learning_rate=4e-3, warmup="5 percent"),
        duration="24 epochs",
        log_every="10 steps",
        checkpoint_every="1 epochs",
        picture_every="4 epochs",
    )
    return common.pretrain(config, arg)
