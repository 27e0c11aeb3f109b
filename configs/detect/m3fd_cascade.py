"""Base with Cascade R-CNN on M3FD, infrared images alone.

Command:   python -m infmae_jax.finetune --config=configs/detect/m3fd_cascade.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS (of `infmae build --dataset=coco_boxes --input=M3FD`: block split)
Hardware:  one host of 8 GPUs, or a TPU slice of 8 chips
Hours:     not measured
Result:    not measured
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common
from configs.detect import m3fd_mask_rcnn
from infmae_jax.models.config import DetectionHeadConfig


def get_config(arg: str = "") -> ConfigDict:
    config = dataclasses.replace(m3fd_mask_rcnn.recipe(), head=DetectionHeadConfig(cascade=True))
    return common.finetune(config, arg)
