"""Base with the U-shaped decoder on IRSTD-1k at its own 512x512: the task's default data, 16 images a step.

Command:   python -m infmae_jax.finetune --config=configs/small_target/irstd1k.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS
Hardware:  one GPU of 40 GB or a TPU slice of 4 chips
Hours:     not measured
Result:    not measured; published for InfMAE: IoU 66.0, F1 79.5, AUC 91.2
"""

from ml_collections import ConfigDict

from configs import common
from infmae_jax.models.config import EncoderConfig
from infmae_jax.tasks.small_target import SmallTargetConfig


def get_config(arg: str = "") -> ConfigDict:
    config = SmallTargetConfig(
        variant="base",
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.1, dtype="bfloat16", position="interpolate"),
        duration="400 epochs",
    )
    return common.finetune(config, arg)
