"""The smallest whole task, also as a process: python -m tests.training.dummy_task RUN '{"kill": [6, 1], "bad": [[5, 0]]}'.

A linear head on frozen features. `bad`: batches (step, order) that are NaN; `kill`: the batch at which SIGKILL comes.
"""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.training import loop
from infmae_jax.training.config import GuardConfig, OptimizerConfig, RunConfig
from infmae_jax.training.task import Evaluator, Group, Loss

CONFIG = RunConfig(
    duration="12 steps", log_every="1 steps", checkpoint_every="4 steps", keep_best=1, best_metric="val/error",
    optimizer=OptimizerConfig(base_learning_rate=1.0, warmup="0 steps"), guards=GuardConfig(2, 1),
)  # fmt: skip


class DummyTask:
    name, dtype, num_examples, fingerprint, substituted = "dummy", "float32", 64, {"data": "dummy"}, 0

    def __init__(self, bad=(), kill=None, batch_size=8):
        self.bad, self.kill, self.batch_size = [tuple(at) for at in bad], kill and tuple(kill), batch_size
        self.batch_spec = {"x": ((batch_size, 6), np.float32), "weight": ((batch_size,), np.float32)}

    def init(self, key):
        draw = jax.random.normal
        return {"encoder": {"still": draw(key, (6, 4))}, "head": {"gate": draw(key, (4, 3)), "bias": jnp.zeros(3)}}

    def initial(self, shapes):
        return None

    def loss(self, params, batch, key):
        head, x = params["head"], batch["x"]
        error = jnp.abs(jnp.tanh(x @ params["encoder"]["still"]) @ head["gate"] + head["bias"][None] - x[:, :3]).sum(1)
        return Loss((error**2 * batch["weight"]).sum(), batch["weight"].sum(), {"l1": (error * batch["weight"]).sum()})

    def group(self, path):
        return Group(frozen=path.startswith("encoder/"), learning_rate=0.5 if path.endswith("bias") else 1.0)

    def evaluators(self):
        def run(params):
            found = self.loss(params, next(DummyTask().train_batches((0, 99))), None)
            picture = np.full((2, 3, 3), 7, np.uint8)
            return {"val/error": float(found.sum / found.weight), "val/picture": picture, "val/table": [{"class": "a"}]}

        return {"val": Evaluator("4 steps", run)}

    def train_batches(self, at):
        for step in range(at[0], 10_000):
            if (step, at[1]) == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            draw = np.random.default_rng([step, at[1]]).standard_normal
            x, weight = draw((self.batch_size, 6)), np.maximum(draw(self.batch_size), 0)
            yield {"x": x.astype(np.float32) * (np.nan if (step, at[1]) in self.bad else 1), "weight": weight.astype("f")}


if __name__ == "__main__":
    loop.train(DummyTask(**json.loads(sys.argv[2])), CONFIG, sys.argv[1])
