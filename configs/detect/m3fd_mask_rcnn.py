"""Base with Mask R-CNN on M3FD, infrared images alone. The data have no masks: it is then Faster R-CNN with RoIAlign.

Command:   python -m infmae_jax.finetune --config=configs/detect/m3fd_mask_rcnn.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS (of `infmae build --dataset=coco_boxes --input=M3FD`: block split)
Hardware:  one host of 8 GPUs, or a TPU slice of 8 chips
Hours:     not measured
Result:    not measured; published for InfMAE: AP50 88.2, AP 56.5 (as DuGI-MAE gives it; its split is not known)
"""

from ml_collections import ConfigDict

from configs import common
from infmae_jax.models.config import EncoderConfig
from infmae_jax.tasks.detect import DetectConfig
from infmae_jax.tasks.finetune import LabelledData


def recipe() -> DetectConfig:
    """What other detectors on this data share."""
    return DetectConfig(
        variant="base",
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.1, dtype="bfloat16", position="interpolate"),
        data=LabelledData(image_size=(768, 1024), batch_size=16, workers=4),
    )


def get_config(arg: str = "") -> ConfigDict:
    return common.finetune(recipe(), arg)
