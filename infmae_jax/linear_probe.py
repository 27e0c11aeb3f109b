"""Linear probe and k-NN of a frozen encoder on labelled images.

    python -m infmae_jax.linear_probe --checkpoint=RUN --workdir=OUT --config.csv=labels.csv --config.label_column=NAME

Labels come from a CSV (columns file, split and labels) or from shard sets that have some (`--config.shards`).
`--checkpoint=random --config.like=RUN` gives the baseline: the same architecture, untrained. The same command again
resumes, or shows the results.
"""

import dataclasses
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines.commands import flags_only, run_command
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, local_path, writing
from data_pipelines.prepare.labelled import prepare_table, table_digest
from data_pipelines.remote import local_folders
from data_pipelines.shards import read_manifest
from data_pipelines.synthetic import write_dataset
from data_pipelines.views import LabelledView
from infmae_jax.evaluation.features import LabelledFeatures, labelled_features
from infmae_jax.interop import checkpoint_flags
from infmae_jax.interop.load import load_encoder
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.tasks.probe import ProbeConfig, ProbeTask
from infmae_jax.training import loop
from infmae_jax.training.config import define_config, from_config
from infmae_jax.training.run_folder import run_path, write_object

RESULTS_NAME, HEADS_NAME = "results.json", "probe.npz"
_DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "linear_probe" / "csv.py"


def linear_probe(trained: TrainedModel, config: ProbeConfig, workdir: str | Path) -> dict[str, dict[str, Any]]:
    """Trains and scores linear classifiers, and k-NN beside them, on frozen features.

    Args:
      trained: the encoder, from `load_encoder`; its image size is that of the features.
      config: what to probe.
      workdir: the run folder (several labels: with a run folder each), with labelled shards and features beside it.

    Returns:
      The results of each label, see `ProbeTask.results`.

    Raises:
      InputError: unusable labels, images or features; see there.
    """
    workdir = Path(workdir)
    shards = config.shards or (str(_shards_of(config, workdir)),)
    names = dict(zip(config.label_column, config.label_column, strict=True))
    if not config.shards and len(names) == 1:
        names = dict.fromkeys(names, "label")  # under which the only label of a table is stored
    results = {}
    for column, label in names.items():
        folder = workdir if len(names) == 1 else workdir / urllib.parse.quote(column, safe=" ")
        task = _task(trained, config, shards, column, label, workdir / "features")
        run_config = dataclasses.replace(config, duration=f"{task.steps()} steps")
        result = loop.train(task, run_config, folder)
        if result.interrupted:
            raise Interrupted(result.stop_code)
        params = jax.device_get(result.state.result)
        results[column] = _described(trained, config, column) | task.results(params)
        _write(folder, results[column], task, params)
    return results


class Interrupted(InputError):
    """The run was asked to end before it was done."""

    def __init__(self, code: int):
        super().__init__("stopped and saved; run the same command to go on")
        self.exit_code = code


def _shards_of(config: ProbeConfig, workdir: Path) -> Path:
    """Labelled shards of the CSV or, without one, of synthetic scenes; made on first use, anew when files change."""
    csv = local_path(config.csv, "csv") if config.csv else None
    if csv is None:
        if not config.synthetic:
            raise InputError("config key csv is empty; give --config.csv=labels.csv (columns file, split and a label)")
        folder = workdir / "synthetic"
        if not folder.is_dir():
            write_dataset(folder, config.synthetic)
        csv = folder / "class_labels.csv"
    shards = workdir / "data" / table_digest(csv, config.label_column)
    if not shards.is_dir():
        prepare_table(csv, config.label_column, shards)
    return shards


def _task(
    trained: TrainedModel, config: ProbeConfig, shards: Sequence[str], column: str, label: str, cache: Path
) -> ProbeTask:
    manifests = [read_manifest(folder) for folder in local_folders(shards)]
    classes = manifests[0].classes.get(label)
    if classes is None or any(m.classes.get(label) != classes for m in manifests):
        known = ", ".join(name for name in manifests[0].classes if name not in ("mask", "objects")) or "none"
        raise InputError(f"label {column!r} is not one of the labels of {shards[0]} ({known}), the same in all sets")
    view = LabelledView(trained.image_size, "stretch" if config.view == "stretch" else "center", flip=False)
    whole, crop = (view, False), (dataclasses.replace(view, whole="", flip=True), False)

    def features(split: str, views: list[tuple[LabelledView, bool]]) -> LabelledFeatures:
        return labelled_features(trained, shards, split, label, views, config.feature, config.feature_batch, cache)

    fingerprint = {"encoder": trained.digest, "shards": [m.fingerprint for m in manifests], "label": column}
    train_views = [whole, *[(view, True)] * config.flip, *[crop] * config.crops]
    train, test = features(config.train_split, train_views), features(config.test_split, [whole])
    return ProbeTask(config, train, test, classes, fingerprint)


def _described(trained: TrainedModel, config: ProbeConfig, column: str) -> dict[str, Any]:
    return {
        "checkpoint": Path(trained.name).name,
        "step": trained.step,
        "encoder_digest": trained.digest,
        "label_column": column,
        "image_size": list(trained.image_size),
        "intensity": dataclasses.asdict(trained.intensity),
        "feature": config.feature,
        "view": config.view,
        "train_views": {"flip": config.flip, "crops": config.crops},
    }


def _write(folder: Path, results: dict[str, Any], task: ProbeTask, params: Any) -> None:
    """results.json, and the classifiers with the statistics that features are normalised with."""
    mean, variance = task.statistics
    heads = {
        name: np.stack([params[f"head_{s}"][name] for s in range(task.config.heads)]) for name in ("kernel", "bias")
    }
    with writing(folder):
        with atomic_write(folder / HEADS_NAME) as partial, partial.open("wb") as stream:
            np.savez(stream, **heads, mean=mean, variance=variance, classes=np.array(task.class_names))
        write_object(folder / RESULTS_NAME, results)


def table_text(results: dict[str, dict[str, Any]]) -> str:
    """The results as a short table for people."""
    lines = []
    for column, result in results.items():
        images = f"{result['train_images']} train and {result['test_images']} test images"
        lines += [
            f"{column}: {len(result['classes'])} classes, {images}; {result['checkpoint']}, "
            f"feature {result['feature']}; mean ± std over {len(result['top1']['seeds'])} seed(s)",
            f"  {'':24}{'top-1 %':>14}{'per-class mean %':>20}",
        ]
        neighbours = f"{result['knn']['neighbors']}-nearest neighbours"
        for title, scores in (
            ("linear probe", result), (neighbours, result["knn"]), ("most frequent class", result["majority_class"])
        ):  # fmt: skip
            top1, balanced = _percent(scores["top1"]), _percent(scores["balanced_accuracy"])
            lines.append(f"  {title:24}{top1:>14}{balanced:>20}")
        classes = (f"{k} {_percent(v['accuracy'])} ({v['images']})" for k, v in result["per_class"].items())
        lines.append(f"  per class: {', '.join(classes)}")
    return "\n".join(lines)


def _percent(share: dict[str, Any] | float | None) -> str:
    """Of a share, or of one with a deviation; "-" where there is none."""
    if isinstance(share, dict):
        return f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}"
    return "-" if share is None else f"{100 * share:.1f}"


def _define_flags() -> None:
    define_config(_DEFAULT, "Config file; every key can be overridden.")
    flags.DEFINE_string("checkpoint", None, "Run folder, published checkpoint file, or 'random'.", required=True)
    flags.DEFINE_string("workdir", None, "Run folder: made, or resumed.", required=True)
    checkpoint_flags.define_architecture()
    checkpoint_flags.define_intensity()


def main(argv: Sequence[str]) -> None:
    flags_only(argv)
    config = from_config(ProbeConfig, flags.FLAGS.config)
    workdir = run_path(flags.FLAGS.workdir, ProbeTask.name)
    trained = load_encoder(
        flags.FLAGS.checkpoint, config.variant, config.like, config.image_size, config.encoder_seed,
        **checkpoint_flags.load_options(),
    )  # fmt: skip
    results = linear_probe(checkpoint_flags.with_intensity(trained), config, workdir)
    print(table_text(results))
    print(f"{RESULTS_NAME}, {HEADS_NAME} and pictures are in {workdir}")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
