"""Linear probe on images listed in a CSV (columns: file, split, label columns), MAE's recipe on cached features.

Command:   python -m infmae_jax.linear_probe --config=configs/linear_probe/csv.py --checkpoint=RUN --workdir=OUT \\
               --config.csv=labels.csv --config.label_column=label
Baseline:  --checkpoint=random --config.like=RUN
Hardware:  any
Hours:     not measured
Result:    not measured
Smoke:     --config=configs/linear_probe/csv.py:smoke makes its own synthetic scenes
"""

from ml_collections import ConfigDict

from infmae_jax.evaluation.probe import ProbeConfig
from infmae_jax.training.config import to_config


def get_config(arg: str = "") -> ConfigDict:
    config = to_config(ProbeConfig())
    if arg == "smoke":
        config.synthetic = 32
        config.batch_size = 16
        config.recipe.epochs = 4
        config.recipe.warmup_epochs = 1
    elif arg:
        raise ValueError(f"unknown form {arg!r} of this config; use '' or 'smoke'")
    return config
