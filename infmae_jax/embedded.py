"""The demo's two ends: the embedded synthetic data set before pretraining, a probe of the encoder after it."""

import dataclasses
from pathlib import Path

from data_pipelines.synthetic import write_dataset
from infmae_jax.tasks.pretrain import PretrainConfig

_PRETRAIN_SEED, _PROBE_SEED = 0, 1  # different scenes


def with_shards(config: PretrainConfig, workdir: str | Path) -> PretrainConfig:
    """The config with `data.shards` set to the embedded set, made on first use; unchanged where shards are given.

    The data set takes the path that users' images take: a folder of images, then `prepare`.
    """
    embedded = config.embedded
    if config.data.shards or not embedded.images:
        return config
    from data_pipelines.prepare import prepare  # here, as in `probe`: most runs start without these imports

    folder = Path(workdir) / "data"
    images, shards = folder / "scenes", folder / "shards"
    if not images.is_dir():
        print(f"making {embedded.images} synthetic thermal scenes in {images}", flush=True)
        write_dataset(images, embedded.images, _PRETRAIN_SEED, (embedded.height, embedded.width), val_fraction=0)
    prepare([images / "images"], shards)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=(str(shards),)))


def probe(config: PretrainConfig, workdir: str | Path) -> dict[str, float]:
    """Linear-probe accuracy (0 to 1) of the run's encoder and of the same one untrained, on synthetic scene classes."""
    from infmae_jax.interop.load import load_encoder
    from infmae_jax.linear_probe import linear_probe
    from infmae_jax.tasks.probe import ProbeConfig

    embedded = config.embedded
    scenes = Path(workdir) / "data" / "labelled"
    if not scenes.is_dir():
        write_dataset(scenes, embedded.probe_images, _PROBE_SEED, (embedded.height, embedded.width), val_fraction=0.5)
    probe_config = ProbeConfig(csv=str(scenes / "class_labels.csv"))
    encoders = {"pretrained": load_encoder(str(workdir)), "untrained": load_encoder("random", like=str(workdir))}
    top1 = {}
    for name, encoder in encoders.items():
        results = linear_probe(encoder, probe_config, Path(workdir) / "probe" / name)
        top1[name] = results["label"]["top1"]["mean"]
    return top1
