"""Linear probe of a pretrained encoder on labelled images.

    python -m infmae_jax.linear_probe --config=configs/linear_probe/csv.py --checkpoint=RUN --workdir=OUT \\
        --config.csv=labels.csv --config.label_column=label

`--checkpoint=random --config.like=RUN` gives the baseline: the same architecture, untrained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.synthetic import write_dataset
from infmae_jax.evaluation.probe import RESULTS_NAME, ProbeConfig, linear_probe, table_text
from infmae_jax.interop import checkpoint_flags
from infmae_jax.interop.load import load_encoder
from infmae_jax.training.config import from_config


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", "configs/linear_probe/csv.py", "Config file.")
    flags.DEFINE_string(
        "checkpoint", None, "Run folder, published checkpoint file, or 'random'.", required=True
    )
    flags.DEFINE_string("workdir", None, "Folder for features and results.", required=True)
    checkpoint_flags.define_architecture()
    checkpoint_flags.define_intensity()


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: this command takes flags only, see --help")
    config = from_config(ProbeConfig, flags.FLAGS.config)
    workdir = Path(flags.FLAGS.workdir).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"workdir {workdir} is a file; give a folder")
    encoder = load_encoder(
        flags.FLAGS.checkpoint, config.model, config.like, config.image_size, config.encoder_seed,
        **checkpoint_flags.load_options(),
    )  # fmt: skip
    encoder = checkpoint_flags.with_intensity(encoder)
    if not config.csv:
        config = dataclasses.replace(config, csv=str(_synthetic(config, workdir)))
    results = linear_probe(encoder, config, workdir)
    print(table_text(results))
    print(f"{RESULTS_NAME}, probe.npz and confusion_matrix.png are in {workdir}")


def _synthetic(config: ProbeConfig, workdir: Path) -> Path:
    """Label CSV of the synthetic scenes, made on first use."""
    if not config.synthetic:
        raise InputError("config key csv is empty; give --config.csv=labels.csv (columns file, split and a label)")
    folder = workdir / "synthetic"
    if not folder.is_dir():
        write_dataset(folder, config.synthetic)
    return folder / "class_labels.csv"


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
