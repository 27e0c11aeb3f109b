"""Shards for measurements that need some: those of the config, or synthetic scenes made for the occasion."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infmae_jax import embedded
from infmae_jax.tasks.pretrain import EmbeddedConfig, PretrainConfig


@contextlib.contextmanager
def scratch(config: PretrainConfig, images: int) -> Iterator[tuple[PretrainConfig, Path]]:
    """The config with shards, of at least `images` synthetic scenes where it has none, and a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="infmae-bench-") as folder:
        scenes = EmbeddedConfig(images=images, height=256, width=320)
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report
            config = embedded.with_shards(dataclasses.replace(config, embedded=scenes), folder)
        yield config, Path(folder)


def origin(config: PretrainConfig) -> str:
    """What a report says of them."""
    return ", ".join(config.data.shards) or "synthetic scenes"
