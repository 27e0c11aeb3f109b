"""The smallest whole task: a linear head on frozen features."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.training.config import GuardConfig, OptimizerConfig, RunConfig
from infmae_jax.training.task import Evaluator, Group, Loss, Position, Task

SCHEDULE = OptimizerConfig(base_learning_rate=4.0, warmup="0 steps", schedule="polynomial")
CONFIG = RunConfig(0, SCHEDULE, duration="12 steps", log_every="1 steps", checkpoint_every="4 steps", keep_best=1,
                   best_metric="val/error", guards=GuardConfig(2, 1))  # fmt: skip


class DummyBatches:
    def __init__(self, task, at):
        self.task, self.at, self.substituted, self.close = task, at, 0, lambda: None

    def keys(self, step):
        return [f"{step}-{self.at.order}"]

    def __next__(self):
        at, self.at = self.at, self.at.next()
        if at == self.task.kill:
            os.kill(os.getpid(), 9)
        draw = np.random.default_rng(at).standard_normal((self.task.batch_size, 7)).astype(np.float32)
        return {"x": draw[:, :6] * np.float32(np.nan if at in self.task.bad else 1), "weight": draw[:, 6].clip(0)}


class DummyTask(Task):
    name, dtype, num_examples, fingerprint = "dummy", "float32", 64, {}

    def __init__(self, kill=(), bad=(), batch_size=8):  # `kill`, `bad` (NaN): batches as [step, order]
        self.kill, self.bad, self.batch_size = tuple(kill), [tuple(at) for at in bad], batch_size
        self.batch_spec = {"x": ((batch_size, 6), np.float32), "weight": ((batch_size,), np.float32)}

    def init(self, key):
        draw = jax.random.normal
        return {"encoder": {"still": draw(key, (6, 4))}, "head": {"gate": draw(key, (4, 3)), "bias": jnp.zeros((1, 3))}}

    def loss(self, params, batch, key):
        features = jnp.tanh(batch["x"] @ params["encoder"]["still"])
        error = jnp.abs(features @ params["head"]["gate"] + params["head"]["bias"] - batch["x"][:, :3]).sum(axis=1)
        return Loss((error**2 * batch["weight"]).sum(), batch["weight"].sum(), {"l1": (error * batch["weight"]).sum()})

    def group(self, path):
        return Group(frozen=path.startswith("encoder/"), learning_rate=0.5 if path.endswith("bias") else 1.0)

    def train_batches(self, at):
        return DummyBatches(self, at)

    def evaluators(self):
        return {"val": Evaluator("4 steps", self.validate)}

    def validate(self, params):
        found = self.loss(jax.device_get(params), next(DummyBatches(self, Position(0, 99))), None)
        return {"val/error": found.sum / found.weight, "val/map": np.ones((2, 3, 3), np.uint8), "val/table": [{"a": 1}]}
