"""Fine-tunes a pretrained encoder on labelled images.

    python -m infmae_jax.finetune --config=configs/segment/msrs_upernet.py --checkpoint=ENCODER --workdir=RUN \\
        --config.data.shards=SHARDS

ENCODER is a run folder, a published `.pth` or `.safetensors` file, or "random". The same command again resumes. At the
end the best checkpoint on the validation split is measured once on the test split, if there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from infmae_jax.evaluate import evaluate
from infmae_jax.interop import checkpoint_flags
from infmae_jax.report import write_report_if_possible
from infmae_jax.tasks.finetune import FineTuneConfig, manifests_of, require_checkpoint, resolved, with_embedded
from infmae_jax.tasks.finetuned import kind_of
from infmae_jax.training import loop
from infmae_jax.training.config import define_config, from_config, to_config, use_compilation_cache
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.hosts import distributed
from infmae_jax.training.run_folder import run_path

_DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "segment" / "masks_tiny_cpu.py"


def _define_flags() -> None:
    define_config(_DEFAULT, "What to train; every key can be overridden.")
    flags.DEFINE_string("checkpoint", None, "Encoder to start from: run folder, checkpoint file, or 'random'.")
    flags.DEFINE_string("workdir", None, "Run folder: made, or resumed.", required=True)
    checkpoint_flags.define_architecture()


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")
    clock, kind = Goodput(), kind_of(flags.FLAGS.config, "--config")
    workdir = run_path(flags.FLAGS.workdir, kind.task.name)
    config = from_config(kind.config, flags.FLAGS.config)
    if flags.FLAGS.checkpoint:
        config = dataclasses.replace(config, checkpoint=flags.FLAGS.checkpoint)
    require_checkpoint(config)
    use_compilation_cache(config)
    if config.distributed.method != "none" and config.embedded.images and not config.data.shards:
        raise InputError("the embedded data set is made for one process; give the shards of several: data.shards")
    config, trained = resolved(with_embedded(config, workdir), **checkpoint_flags.load_options())
    task = kind.task(config, trained)
    with distributed.joined(config.distributed, to_config(config), task.fingerprint) as peers:
        primary = jax.process_index() == 0
        result = loop.train(task, config, workdir, peers, clock, at_end=write_report_if_possible)
    if result.interrupted:
        if primary:
            print(f"stopped and saved at step {result.step} of {result.total_steps}; run the same command to go on")
        return result.stop_code
    if primary:
        _finish(config, workdir)
    return 0


def _finish(config: FineTuneConfig, workdir: Path) -> None:
    """Measures the best checkpoint on the test split, once, and says what to run next."""
    split = config.data.test_split
    if not all(split in manifest.splits for manifest in manifests_of(config)):
        split = config.data.val_split
    print(evaluate(workdir, workdir / "evaluation", config.data.shards, split))
    print(f"report: {workdir / 'report.html'}, measures and pictures: {workdir / 'evaluation'}")
    print(f"next: python -m infmae_jax.predict --checkpoint={workdir} --output=DIR IMAGES_OR_FOLDER...")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
