"""The fine-tuning tasks that the tests run."""

import dataclasses

from configs.detect import boxes_tiny_cpu
from configs.segment import masks_tiny_cpu
from configs.small_target import targets_tiny_cpu
from infmae_jax.tasks.finetune import resolved
from infmae_jax.tasks.finetuned import KINDS
from infmae_jax.training.config import from_config

# Of segmentation the head that compiles fastest; its default head is trained in tests/test_outputs.py.
SETTINGS = {"segment": {"kind": "fcn", "fcn_convs": 1}}
CASES = {"segment": (masks_tiny_cpu, "surfaces"), "small_target": (targets_tiny_cpu, "targets")}
_ALL = {**CASES, "detect": (boxes_tiny_cpu, "boxes")}


def task_of(kind, checkpoint, labelled, **changes):
    """The task of a smoke config, and its resolved config."""
    module, name = _ALL[kind]
    values = module.get_config("smoke")
    values.head.update(SETTINGS.get(kind, {}))
    config = from_config(KINDS[kind].config, values)
    data = dataclasses.replace(config.data, shards=(str(labelled / name),), **changes.pop("data", {}))
    config = dataclasses.replace(config, checkpoint=str(checkpoint), data=data, **changes)
    config, trained = resolved(config)
    return KINDS[kind].task(config, trained), config
