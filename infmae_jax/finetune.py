"""Fine-tunes a pretrained encoder on labelled images.

    python -m infmae_jax.finetune --config=configs/segment/msrs_upernet.py --checkpoint=ENCODER --workdir=RUN \\
        --config.data.shards=SHARDS

ENCODER is a run folder, a published `.pth` or `.safetensors` file, or "random". The same command again resumes. At the
end the best checkpoint on the validation split is measured once on the test split, if there is one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from data_pipelines.commands import flags_only, run_command
from data_pipelines.errors import InputError
from infmae_jax.evaluate import evaluate
from infmae_jax.evaluation.hosts import same_everywhere
from infmae_jax.interop import checkpoint_flags
from infmae_jax.interop.load import load_encoder
from infmae_jax.tasks.finetune import (
    FineTuneConfig,
    fingerprint_of,
    manifests_of,
    require_checkpoint,
    resolved,
    with_embedded,
)
from infmae_jax.tasks.finetune_task import FineTuneTask
from infmae_jax.tasks.finetuned import kind_of
from infmae_jax.train_command import begin, train
from infmae_jax.training.config import define_config, from_config
from infmae_jax.training.goodput import Goodput
from infmae_jax.training.run_folder import run_path

_DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "segment" / "masks_tiny_cpu.py"


def _define_flags() -> None:
    define_config(_DEFAULT, "What to train; every key can be overridden.")
    flags.DEFINE_string("checkpoint", None, "Encoder to start from: run folder, checkpoint file, or 'random'.")
    flags.DEFINE_string("workdir", None, "Run folder: made, or resumed.", required=True)
    checkpoint_flags.define_architecture()


def main(argv: Sequence[str]) -> int:
    flags_only(argv)
    if flags.FLAGS["config"].using_default_value:
        raise InputError("--config is missing: name one of configs/segment, configs/detect or configs/small_target")
    clock, kind = Goodput(), kind_of(flags.FLAGS.config, "--config")
    workdir = run_path(flags.FLAGS.workdir, kind.task.name)
    config = from_config(kind.config, flags.FLAGS.config)
    if flags.FLAGS.checkpoint:
        config = dataclasses.replace(config, checkpoint=flags.FLAGS.checkpoint)
    require_checkpoint(config)
    begin(config)
    options, loaded = checkpoint_flags.load_options(), None
    if config.embedded.images and not config.data.shards:  # one process; a bad checkpoint leaves no data behind
        loaded = load_encoder(config.checkpoint, config.variant, **options)
    config = with_embedded(config, workdir)

    def make() -> tuple[FineTuneTask, FineTuneConfig]:
        whole, trained = resolved(config, loaded, **options)
        if not same_everywhere(trained.digest):
            raise InputError(f"checkpoint {config.checkpoint} is not the same encoder on all hosts; copy one to each")
        return kind.task(whole, trained), whole

    return train(config, fingerprint_of(config), make, workdir, clock, lambda step: _finish(config, workdir))


def _finish(config: FineTuneConfig, workdir: Path) -> None:
    """Measures the best checkpoint on the test split, once, every host its share, and says what to run next."""
    split = config.data.test_split
    if not all(split in manifest.splits for manifest in manifests_of(config)):
        split = config.data.val_split
    table = evaluate(workdir, workdir / "evaluation", config.data.shards, split)
    if jax.process_index() == 0:
        print(table)
        print(f"report: {workdir / 'report.html'}, measures and pictures: {workdir / 'evaluation'}")
        print(f"next: python -m infmae_jax.predict --checkpoint={workdir} --output=DIR IMAGES_OR_FOLDER...")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
