"""Shard sets on object stores, by URL: copied to this host once, checked, and read from there.

Training reads records in random order, hundreds of times over; a copy on a local disk costs one pass over the network
instead of one an epoch. Anything that fsspec opens will do (gs://, s3://, https://; the store's own package must be
installed). Mounted paths are read in place.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from data_pipelines.errors import InputError
from data_pipelines.shards import MANIFEST_NAME, Shard, describe_shard, read_manifest

CACHE_VARIABLE = "INFMAE_CACHE"
DEFAULT_CACHE = "~/.cache/infmae"


def local_folders(folders: Sequence[str]) -> tuple[str, ...]:
    """Local folders with the content of shard sets; those that are no URLs are returned as they are.

    Copies are kept in the folder named by the environment variable INFMAE_CACHE (default ~/.cache/infmae), under the
    digest of the manifest, so that a changed set is copied anew and an unchanged one never again. Nothing is written
    outside of that folder, whatever the manifest says.

    Raises:
      InputError: the URL cannot be read, or what arrives differs from the manifest's digests.
    """
    return tuple(_copy_of(folder) if "://" in folder else folder for folder in folders)


@functools.lru_cache(maxsize=64)
def _copy_of(url: str) -> str:
    cache = Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="copying-", dir=cache) as arriving:
        try:
            store, root = fsspec.core.url_to_fs(url)
            store.get_file(f"{root.rstrip('/')}/{MANIFEST_NAME}", f"{arriving}/{MANIFEST_NAME}")
        except FileNotFoundError:
            raise InputError(f"{url} is not a shard set (no {MANIFEST_NAME} in it): check the URL") from None
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"{url} cannot be read: {' '.join(str(error).split())}") from error
        manifest = read_manifest(arriving)  # checked whole before anything that it names is written
        final = cache / hashlib.sha256(Path(arriving, MANIFEST_NAME).read_bytes()).hexdigest()
        if not final.exists():
            for shard in manifest.shards:
                _fetch(store, root, shard, arriving, url)
            _publish(Path(arriving), final)
    return str(final)


def _fetch(store: Any, root: str, shard: Shard, folder: str, url: str) -> None:
    target = os.path.join(folder, shard.name)
    try:
        store.get_file(f"{root.rstrip('/')}/{shard.name}", target)
    except OSError as error:
        raise InputError(f"{url}/{shard.name} cannot be read: {error}") from error
    if describe_shard(target, shard.count) != shard:
        raise InputError(f"{url}/{shard.name} differs from the digest in {MANIFEST_NAME}: upload the shard set again")


def _publish(arrived: Path, final: Path) -> None:
    """Makes the whole copy visible at once; when another process was faster, its copy is as good."""
    whole = Path(tempfile.mkdtemp(prefix="arrived-", dir=final.parent))
    for path in arrived.iterdir():
        path.rename(whole / path.name)
    try:
        whole.rename(final)
    except OSError:
        shutil.rmtree(whole)
        if not final.exists():
            raise
