"""Tiny variant and a narrow decoder on images with target masks, on the CPU of a laptop.

Command:   python -m infmae_jax.finetune --config=configs/small_target/targets_tiny_cpu.py --checkpoint=ENCODER
           --workdir=RUN --config.data.shards=SHARDS (without it: synthetic scenes, made on the spot)
Hardware:  2 CPU cores
Hours:     0.2 for 400 steps of 8 crops
Result:    configs/README.md
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.transforms import InfraredAugment
from infmae_jax.models.config import EncoderConfig, SmallTargetHeadConfig
from infmae_jax.tasks.finetune import EmbeddedLabels, LabelledData
from infmae_jax.tasks.small_target import SmallTargetConfig
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    config = SmallTargetConfig(
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.05),
        head=SmallTargetHeadConfig(widths=(64, 48, 32, 16, 8)),
        optimizer=OptimizerConfig(base_learning_rate=0.048, warmup="5 percent", schedule="polynomial", b2=0.999),
        data=LabelledData(
            image_size=(128, 128),
            batch_size=16,
            zoom=(0.8, 1.6),
            focus=0.5,
            augment=InfraredAugment(gain=0.3, offset=20.0),
        ),
        duration="800 steps",
        embedded=EmbeddedLabels(images=240),
    )
    return common.finetune(config, arg)
