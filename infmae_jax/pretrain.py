"""Pretrains an encoder: python -m infmae_jax.pretrain --config=configs/pretrain/….py --workdir=RUN.

Running the same command again resumes. Without flags it runs the demo on the embedded synthetic data set.
"""

import os
from pathlib import Path

import jax
from absl import flags

from data_pipelines.commands import flags_only, run_command
from infmae_jax import embedded
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.train_command import begin, train
from infmae_jax.training.config import define_config, from_config
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.run_folder import run_path
from infmae_jax.training.writers import METRICS_NAME

_DEMO = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "demo.py"


def _define_flags() -> None:
    define_config(_DEMO, "What to run; every key can be overridden.")
    flags.DEFINE_string("workdir", os.path.join("runs", "demo"), "Run folder: made, or resumed.")


def main(argv: list[str]) -> int:
    flags_only(argv)
    clock = Goodput()
    config = from_config(PretrainConfig, flags.FLAGS.config)
    workdir = run_path(flags.FLAGS.workdir, PretrainTask.name)
    begin(config)
    config = embedded.with_shards(config, workdir)
    task = PretrainTask(config)

    def finish(step: int) -> None:
        if jax.process_index() == 0:
            print(_summary(config, workdir, step))

    return train(config, task.fingerprint, lambda: (task, config), workdir, clock, finish)


def _summary(config: PretrainConfig, workdir: Path, step: int) -> str:
    """Where everything is and what to run next; for the demo, what the probe says."""
    lines = []
    labels = "labels.csv"
    if config.embedded.probe_images and jax.process_count() == 1:
        top1 = embedded.probe(config, workdir)
        labels = str(workdir / "data" / "labelled" / "class_labels.csv")
        scores = ", ".join(f"{name} {100 * value:.1f} %" for name, value in top1.items())
        lines.append(f"linear probe, scene class of synthetic scenes, top-1: {scores}")
    drawn = workdir / "pictures" / f"step_{step:08d}_reconstruction.png"
    return "\n".join([
        *lines,
        "",
        f"finished {step} steps in {workdir}:",
        f"  checkpoints      {workdir / 'checkpoints'}",
        f"  losses           {workdir / METRICS_NAME}, {workdir / 'tensorboard'}",
        f"  report           {workdir / 'report.html'}",
        *([f"  reconstructions  {drawn}"] if drawn.exists() else []),
        f"  what ran         {workdir / 'config.json'}, {workdir / 'run_info.json'}",
        "next:",
        f"  python -m infmae_jax.reconstruct --checkpoint={workdir} --output=reconstruction.png IMAGE...",
        f"  python -m infmae_jax.linear_probe --config=configs/linear_probe/csv.py --checkpoint={workdir} "
        f"--workdir=runs/probe --config.csv={labels}",
    ])  # fmt: skip


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
