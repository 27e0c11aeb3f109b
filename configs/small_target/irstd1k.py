"""Base with the U-shaped decoder on IRSTD-1k at its own 512x512.

Command:   python -m infmae_jax.finetune --config=configs/small_target/irstd1k.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS
Hardware:  one GPU of 40 GB or a TPU slice of 4 chips
Hours:     not measured
Result:    not measured; published for InfMAE: IoU 66.0, F1 79.5, AUC 91.2
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.transforms import InfraredAugment
from infmae_jax.models.config import EncoderConfig
from infmae_jax.tasks.finetune import LabelledData
from infmae_jax.tasks.small_target import SmallTargetConfig


def get_config(arg: str = "") -> ConfigDict:
    config = SmallTargetConfig(
        variant="base",
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.1, dtype="bfloat16", position="interpolate"),
        data=LabelledData(
            image_size=(512, 512),
            batch_size=16,
            zoom=(1.0, 1.0),
            focus=0.5,
            augment=InfraredAugment(gain=0.3, offset=20.0),
        ),
        duration="400 epochs",
    )
    return common.finetune(config, arg)
