"""Tiny variant with a narrow UperNet on images with class masks, on the CPU of a laptop.

Command:   python -m infmae_jax.finetune --config=configs/segment/masks_tiny_cpu.py --checkpoint=ENCODER --workdir=RUN
           --config.data.shards=SHARDS (without it: synthetic scenes, made on the spot)
Hardware:  2 CPU cores
Hours:     0.25
Result:    mIoU 32 on its synthetic scenes, from the demo's encoder (one run); real images: configs/README.md
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.transforms import InfraredAugment
from infmae_jax.evaluation.windows import Windows
from infmae_jax.models.config import EncoderConfig, SegmentationHeadConfig
from infmae_jax.tasks.finetune import EmbeddedLabels, LabelledData
from infmae_jax.tasks.segment import SegmentConfig
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    config = SegmentConfig(
        encoder=EncoderConfig(fuse_stages=False, drop_path=0.05),
        head=SegmentationHeadConfig(channels=64, auxiliary_channels=64),
        optimizer=OptimizerConfig(base_learning_rate=1.6e-2, warmup="5 percent", schedule="polynomial", b2=0.999),
        data=LabelledData(
            image_size=(160, 160), batch_size=16, zoom=(0.5, 1.5), augment=InfraredAugment(gain=0.3, offset=20.0)
        ),
        windows=Windows((0, 0), batch_size=8),
        duration="800 steps",
        embedded=EmbeddedLabels(images=240),
    )
    return common.finetune(config, arg)
