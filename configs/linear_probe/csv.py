"""Linear probe on images listed in a CSV (columns: file, split, label columns): MAE's recipe on features computed once.

Command:   python -m infmae_jax.linear_probe --config=configs/linear_probe/csv.py --checkpoint=RUN --workdir=OUT \\
               --config.csv=labels.csv --config.label_column=label
Baseline:  --checkpoint=random --config.like=RUN (the same architecture, untrained)
Hardware:  any; 2 CPU cores are enough for some thousand images
Hours:     tiny variant at 224x224 on CPU: 0.045 s of one core per image, then seconds for three classifiers
Result:    top-1 of the untrained tiny variant at 224x224, %: HIT-UAV camera angle 24.1, day/night 73.6; drone
           classes 76.7
"""

from ml_collections import ConfigDict

from configs.common import check_argument
from infmae_jax.tasks.probe import ProbeConfig
from infmae_jax.training.config import to_config


def get_config(arg: str = "") -> ConfigDict:
    config = to_config(ProbeConfig())
    if check_argument(arg):  # makes its own synthetic scenes
        config.synthetic = 32
        config.image_size = (64, 64)
        config.feature_batch = 16
        config.heads = 1
        config.duration = "8 steps"
        config.least_steps = 0
    return config
