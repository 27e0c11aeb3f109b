"""A fine-tuning task, whatever it is: training, prediction, and what evaluating takes of a run."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.synthetic import write_shards
from infmae_jax.bench import timing
from infmae_jax.bench.results import Row, report
from infmae_jax.bench.step import TimedStep, synthetic_batch
from infmae_jax.evaluation.windows import batch_size_of
from infmae_jax.tasks.finetune import AUTO, FineTuneConfig, usual_duration, without_data
from infmae_jax.tasks.finetuned import Kind
from infmae_jax.training.duration import in_steps

_EVALUATED = 24  # scenes, a quarter of them in the split that is measured
_SLICE = 2.0  # seconds of a turn: the first call after another's finds no memory and no caches of its own
_SET = 1333  # images of a data set of the usual size, a quarter of them in the validation split
_SHARE_NOTE = (
    "predict: on images of the training size. evaluate: scenes of the validation split with their measures, read from "
    "disk. share_of_training: of a run of the config's duration on {train} images, evaluated on {val} as often as the "
    "config says."
)


def finetune(kind: Kind, config: FineTuneConfig, batch: int, rounds: int) -> dict[str, Any]:
    """Training step, prediction and evaluation in turns, with random weights on one device and synthetic scenes."""
    config = without_data(config)
    program = TimedStep(config, batch)
    program.start()
    model, at_once = kind.model(config), min(batch_size_of(config.windows)(config.data.image_size), batch)
    params = jax.device_get(program.state.result)
    images = jax.device_put(synthetic_batch(program.program.task)["image"][:at_once, ..., 0])
    on_device = jax.device_put(params)

    def predict(times: int) -> None:
        for _ in range(times):
            found = model.compute(on_device, images)
        jax.block_until_ready(found)

    with tempfile.TemporaryDirectory(prefix="infmae-bench-scenes-") as folder:
        shards = Path(folder) / "scenes"
        embedded = config.embedded
        write_shards(shards, _EVALUATED, size=(embedded.height, embedded.width), mask=config.SYNTHETIC_MASK)

        def evaluate(times: int) -> None:
            for _ in range(times):
                model.evaluate(params, [str(shards)], config.data.val_split)

        work = {"train": (program, batch), "predict": (predict, at_once), "evaluate": (evaluate, _EVALUATED // 4)}
        seconds = timing.take_turns({name: call for name, (call, _) in work.items()}, rounds, _SLICE)
    rows: list[Row] = [{"name": name, **timing.rate_row(seconds[name], count)} for name, (_, count) in work.items()]
    rows[0] |= {"memory_gib": program.memory_gib, "compile_s": program.compile_seconds}
    whole = config.embedded.images or _SET
    train, val = whole - whole // 4, whole // 4
    times = {name: seconds[name] / count for name, (_, count) in work.items()}
    rows[2]["share_of_training"] = _percent(_share(config, batch, train, val, times["train"], times["evaluate"]))
    program.stop()
    settings = {
        "variant": config.variant or "tiny", "dtype": config.encoder.dtype, "rounds": rounds, "batch": batch,
        "image_size": list(config.data.image_size), "windows": str(config.windows),
        "evaluated_size": [embedded.height, embedded.width],
    }  # fmt: skip
    return report(config.task, settings, rows, [_SHARE_NOTE.format(train=train, val=val)])


def _share(
    config: FineTuneConfig, batch: int, train: int, val: int, train_seconds: np.ndarray, val_seconds: np.ndarray
) -> np.ndarray:
    """Seconds of all evaluations over those of all steps, in each round."""
    whole = usual_duration(train) if config.duration == AUTO else config.duration
    steps = in_steps(whole, batch_size=batch, num_examples=train)
    every = in_steps(config.evaluate_every, batch_size=batch, num_examples=train, total_steps=steps)
    evaluations = 1 + -(-steps // every) if every else 0  # before the first step and after the last one, too
    return evaluations * val * val_seconds / (steps * batch * train_seconds)


def _percent(shares: np.ndarray) -> str:
    low, median, high = timing.spread(100 * shares)
    return f"{median:.3g} % ({low:.3g}-{high:.3g})"
