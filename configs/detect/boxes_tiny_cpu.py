"""Tiny variant with a narrow Mask R-CNN on images with boxes, on the CPU of a laptop.

Command:   python -m infmae_jax.finetune --config=configs/detect/boxes_tiny_cpu.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS (without it: synthetic scenes, made on the spot)
Hardware:  2 CPU cores
Hours:     0.5 for 450 steps of 8 crops of 192x192
Result:    configs/README.md
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.transforms import InfraredAugment
from infmae_jax.evaluation.windows import Windows
from infmae_jax.models.config import DetectionHeadConfig, EncoderConfig
from infmae_jax.tasks.detect import DetectConfig
from infmae_jax.tasks.finetune import EmbeddedLabels, LabelledData
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    config = DetectConfig(
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.05),
        head=DetectionHeadConfig(
            channels=64, box_channels=256, box_convs=2, mask_convs=2, pre_nms_train=500, pre_nms_test=500,
            proposals_train=300, proposals_test=300, rois=96, max_candidates=500,
        ),
        optimizer=OptimizerConfig(
            base_learning_rate=0.032, warmup="5 percent", schedule="half_cosine", weight_decay=0.1, b2=0.999
        ),
        layer_decay=0.5,  # at a rate at which the heads learn from nothing, an encoder forgets what it knew
        data=LabelledData(
            image_size=(256, 256), batch_size=8, zoom=(0.75, 1.5), focus=0.8,
            augment=InfraredAugment(gain=0.3, offset=20.0),
        ),
        windows=Windows((0, 0), batch_size=4),
        duration="2000 steps",
        embedded=EmbeddedLabels(images=240),
    )  # fmt: skip
    return common.finetune(config, arg)
