"""Base with Cascade R-CNN on M3FD, infrared images alone.

Command:   python -m infmae_jax.finetune --config=configs/detect/m3fd_cascade.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS (of `infmae build --dataset=coco_boxes --input=M3FD`: block split)
Hardware:  one host of 8 GPUs, or a TPU slice of 8 chips
Hours:     not measured
Result:    not measured
"""

from ml_collections import ConfigDict

from configs import common
from infmae_jax.models.config import DetectionHeadConfig, EncoderConfig
from infmae_jax.tasks.detect import DetectConfig
from infmae_jax.tasks.finetune import LabelledData


def get_config(arg: str = "") -> ConfigDict:
    config = DetectConfig(
        variant="base",
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.1, dtype="bfloat16", position="interpolate"),
        head=DetectionHeadConfig(cascade=True),
        data=LabelledData(image_size=(768, 1024), batch_size=16, workers=4),
    )
    return common.finetune(config, arg)
