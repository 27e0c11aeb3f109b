"""Base with FCN on the stride-16 map on MSRS, infrared images alone: the published transfer's network and recipe.

Command:   python -m infmae_jax.finetune --config=configs/segment/msrs_fcn.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS
Hardware:  one host of 4 to 8 GPUs, or a TPU slice of 8 chips
Hours:     not measured
Result:    not measured; published for InfMAE: mIoU 72.6, mAcc 80.5 (FCN, pretrained on Inf-590K)
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common
from configs.segment import msrs_upernet
from infmae_jax.models.config import SegmentationHeadConfig


def get_config(arg: str = "") -> ConfigDict:
    config = dataclasses.replace(msrs_upernet.recipe(), head=SegmentationHeadConfig(kind="fcn", channels=512))
    return common.finetune(config, arg)
