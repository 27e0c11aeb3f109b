"""Demo: pretrain the tiny variant on the embedded synthetic data set, then probe it against the untrained encoder.

Command:   launch/local.sh
Hardware:  2 CPU cores
Hours:     0.07 (4 min 17 s, installation included)
Result:    loss 1.7 -> 0.4; linear probe of 6 scene classes, top-1 60 % pretrained, 41 % untrained
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import EmbeddedConfig, PretrainConfig
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    config = PretrainConfig(
        model=variant("tiny"),
        data=PipelineConfig(image_size=(96, 96), batch_size=32),
        optimizer=OptimizerConfig(base_learning_rate=4e-3, warmup="10 percent"),
        duration="500 steps",
        log_every="5 steps",
        checkpoint_every="100 steps",
        picture_every="250 steps",
        embedded=EmbeddedConfig(images=600, probe_images=300),
    )
    return common.pretrain(config, arg)
