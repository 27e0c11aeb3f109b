"""MCMAE (masked convolution MAE): the hybrid encoder of InfMAE, random masks, MAE's decoder (8 blocks of width 512).

The baseline that tells what InfMAE's masks add; everything else as in inf30_base.

Command:   python -m infmae_jax.pretrain --config=configs/pretrain/mcmae_base.py --workdir=RUN \\
               --config.data.shards=SHARDS
Hardware:  one GPU host or a TPU slice
Hours:     not measured
Result:    not measured
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common
from configs.pretrain import inf30_base
from data_pipelines.masking import MaskConfig
from infmae_jax.models.config import variant


def get_config(arg: str = "") -> ConfigDict:
    config = inf30_base.recipe()
    data = dataclasses.replace(config.data, mask=MaskConfig(score="none", selection="random"))
    model = variant("base", decoder_width=512, decoder_depth=8, decoder_heads=16, dtype="bfloat16")
    return common.pretrain(dataclasses.replace(config, model=model, data=data), arg)
