"""Base with UperNet of width 768 on MSRS, infrared images alone: the published transfer's network and recipe.

Command:   python -m infmae_jax.finetune --config=configs/segment/msrs_upernet.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS
Hardware:  one host of 4 to 8 GPUs, or a TPU slice of 8 chips
Hours:     not measured
Result:    not measured; published for InfMAE: mIoU 74.3, mAcc 82.5 (UperNet)
"""

from ml_collections import ConfigDict

from configs import common
from infmae_jax.models.config import EncoderConfig, SegmentationHeadConfig
from infmae_jax.tasks.segment import SegmentConfig


def recipe() -> SegmentConfig:
    """What other heads on this data share."""
    return SegmentConfig(
        variant="base",
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.2, dtype="bfloat16", position="interpolate"),
        head=SegmentationHeadConfig(channels=768),
    )


def get_config(arg: str = "") -> ConfigDict:
    return common.finetune(recipe(), arg)
