"""Plain MAE (ViT-Base, random masking) with everything else as in inf30_base: the baseline of the publication.

Command:   python -m infmae_jax.pretrain --config=configs/pretrain/mae_base.py --workdir=RUN --config.data.shards=SHARDS
Hardware:  one GPU host or a TPU slice
Hours:     not measured
Result:    not measured (published after fine-tuning: MSRS 71.4 mIoU, M3FD 81.5 AP50)
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
    model = variant("base", kind="vit", depths=(0, 0, 12), decoder_depth=8, dtype="bfloat16")
    return common.pretrain(dataclasses.replace(config, model=model, data=data), arg)
