import dataclasses

import pytest

from configs.pretrain import inf30_base
from infmae_jax.tasks.pretrain import PretrainConfig
from infmae_jax.training.config import from_config


@pytest.fixture(scope="session")
def smoke() -> PretrainConfig:
    """The published recipe at a size that compiles in seconds, in float32."""
    config = from_config(PretrainConfig, inf30_base.get_config("smoke"))
    return dataclasses.replace(config, model=config.model.replace(dtype="float32", depths=(1, 1, 1)))
