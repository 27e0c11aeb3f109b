"""One process of a job that trains several small runs, one after the other: python -m tests.training.host_process JSON.

JSON: {"shards": …, "distributed": {…}, "runs": [{"run": folder, "mesh": {…}, "steps": n, "kind": of encoder,
"until": n or null, "devices": n or null, "copy": folder or null}, …]}. `until` ends a run early, as a signal would;
`devices` uses the first n only; `copy` goes on with a copy of another run.
"""

import dataclasses
import json
import os
import shutil
import signal
import sys
from unittest import mock

import jax

from configs import common
from data_pipelines.pipeline import PipelineConfig
from infmae_jax.models.config import variant
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training import loop, sharding
from infmae_jax.training.config import DistributedConfig, MeshConfig, from_config, to_config
from infmae_jax.training.hosts import distributed


class EndingEarly(PretrainTask):
    """Asks for the end, as a preemption does, when the batch of step `until` is taken."""

    def __init__(self, config, until):
        super().__init__(config)
        self._until = until

    def train_batches(self, at):
        inner, until = super().train_batches(at), self._until

        class Batches:
            step = at.step
            substituted = 0
            close = staticmethod(inner.close)

            def __next__(self):
                if self.step == until:
                    os.kill(os.getpid(), signal.SIGTERM)
                self.step += 1
                return next(inner)

        return Batches()


def make_config(shards, mesh, steps, kind):
    smoke = common.pretrain(PretrainConfig(model=variant("tiny"), data=PipelineConfig(shards=(shards,))), "smoke")
    smoke.model.encoder.update(kind=kind, depths=(1, 1, 1))
    return dataclasses.replace(
        from_config(PretrainConfig, smoke),
        duration=f"{steps} steps", checkpoint_every="0 steps", picture_every="0 steps", mesh=MeshConfig(**mesh),
    )  # fmt: skip


def main(shards, runs, distributed_config):
    configs = [make_config(shards, run["mesh"], run["steps"], run["kind"]) for run in runs]
    config = dataclasses.replace(configs[0], distributed=DistributedConfig(**distributed_config))
    with distributed.joined(config.distributed, to_config(config), {"fingerprint": "same"}) as peers:
        whole = sharding.make_mesh
        for run, config in zip(runs, configs, strict=True):
            if run.get("copy"):
                shutil.copytree(run["copy"], run["run"])
            chosen = jax.devices()[: run["devices"]] if run.get("devices") else None
            task = PretrainTask(config) if run.get("until") is None else EndingEarly(config, run["until"])
            with mock.patch.object(sharding, "make_mesh", lambda mesh, chosen=chosen: whole(mesh, chosen)):
                result = loop.train(task, config, run["run"], peers)
            assert result.interrupted == (run.get("until") is not None)


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    main(task["shards"], task["runs"], task["distributed"])
