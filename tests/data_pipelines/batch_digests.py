"""Prints one digest a sample of some batches: what one host of a real run sees.

    python -m tests.data_pipelines.batch_digests SHARDS BATCH START STEPS PROCESS PROCESSES WORKERS THREADS

Each line is `step digest digest ...` in sample order.
"""

import hashlib
import sys

from data_pipelines.masking import MaskConfig
from data_pipelines.pipeline import PipelineConfig, train_batches


def sample_digests(batch):
    return [
        hashlib.sha256(image.tobytes() + ids.tobytes()).hexdigest()[:16]
        for image, ids in zip(batch["image"], batch["ids_keep"], strict=True)
    ]


def main(shards, *numbers):
    batch_size, start, steps, process, processes, workers, threads = map(int, numbers)
    # Random masks too, so that every source of randomness is compared.
    mask = MaskConfig(score="none", selection="random")
    config = PipelineConfig(
        shards=tuple(shards.split(",")), batch_size=batch_size, seed=3, mask=mask, workers=workers, threads=threads
    )
    with train_batches(config, start, process, processes) as batches:
        for step in range(start, start + steps):
            print(step, *sample_digests(next(batches)))


if __name__ == "__main__":
    main(*sys.argv[1:])
