"""InfMAE-Base on Inf30 with the published recipe: 400 epochs of 305,241 images, warm-up 40, batch 256.

Command:   python -m infmae_jax.pretrain --config=configs/pretrain/inf30_base.py --workdir=RUN \\
               --config.data.shards=SHARDS
Hardware:  4 x A100 in the publication; one GPU host or a TPU slice here
Hours:     not measured
Result:    not measured (published after fine-tuning: MSRS 74.3 mIoU, M3FD 88.1 AP50)
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import OptimizerConfig


def recipe() -> PretrainConfig:
    """What the baselines beside this file share."""
    return PretrainConfig(
        model=variant("base", dtype="bfloat16"),
        data=PipelineConfig(image_size=(224, 224), batch_size=256, workers=8),
        optimizer=OptimizerConfig(base_learning_rate=1.5e-4, warmup="40 epochs"),
        duration="400 epochs",
        log_every="50 steps",
        checkpoint_every="1 epochs",
        picture_every="10 epochs",
    )


def get_config(arg: str = "") -> ConfigDict:
    return common.pretrain(recipe(), arg)
