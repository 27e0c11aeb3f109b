"""Plain MAE (ViT-Base, random masking) with everything else as in inf30_base: the baseline of the publication.

Command:   python -m infmae_jax.pretrain --config=configs/pretrain/mae_base.py --workdir=RUN --config.data.shards=SHARDS
Hardware:  one GPU host or a TPU slice
Hours:     not measured
Result:    not measured (published after fine-tuning: MSRS 71.4 mIoU, M3FD 81.5 AP50)
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.masking import MaskConfig
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    mask = MaskConfig(score="none", selection="random")
    config = PretrainConfig(
        model=variant("base", kind="vit", depths=(0, 0, 12), decoder_depth=8, dtype="bfloat16"),
        data=PipelineConfig(image_size=(224, 224), batch_size=256, workers=8, mask=mask),
        optimizer=OptimizerConfig(base_learning_rate=1.5e-4, warmup="40 epochs"),
        duration="400 epochs",
    )
    return common.pretrain(config, arg)
