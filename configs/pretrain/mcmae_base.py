"""MCMAE (masked convolution MAE): InfMAE's hybrid encoder, random masks, MAE's decoder of 8 blocks of width 512.

The baseline that tells what InfMAE's masks add; everything else as in inf30_base.

Command:   python -m infmae_jax.pretrain --config=configs/pretrain/mcmae_base.py --workdir=RUN \\
               --config.data.shards=SHARDS
Hardware:  one GPU host or a TPU slice
Hours:     not measured
Result:    not measured
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.masking import MaskConfig
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.infmae import variant
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import OptimizerConfig


def get_config(arg: str = "") -> ConfigDict:
    mask = MaskConfig(score="none", selection="random")
    config = PretrainConfig(
        model=variant("base", decoder_width=512, decoder_depth=8, decoder_heads=16, dtype="bfloat16"),
        data=PipelineConfig(image_size=(224, 224), batch_size=256, workers=8, mask=mask),
        optimizer=OptimizerConfig(base_learning_rate=1.5e-4, warmup="40 epochs"),
        duration="400 epochs",
    )
    return common.pretrain(config, arg)
