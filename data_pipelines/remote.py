"""Shard sets on object stores, by URL: copied to this host once, checked, and read from there.

Training reads records in random order, hundreds of times over; a copy on a local disk costs one pass over the network
instead of one an epoch. Anything that fsspec opens will do (gs://, s3://, https://; the store's own package must be
installed). Mounted paths are read in place.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from data_pipelines.errors import InputError, refusing
from data_pipelines.files import atomic_write
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
    return tuple(_copy_of(folder) if "://" in folder else os.path.expanduser(folder) for folder in folders)


@functools.lru_cache(maxsize=64)
def _copy_of(url: str) -> str:
    cache = Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with refusing(f"{url} cannot be read", "check the URL and the access", ImportError, ValueError, OSError):
        store, root = fsspec.core.url_to_fs(url)
        try:
            manifest = store.cat_file(f"{root.rstrip('/')}/{MANIFEST_NAME}")
        except FileNotFoundError:
            raise InputError(f"{url} is not a shard set (no {MANIFEST_NAME} in it): check the URL") from None
    final = cache / hashlib.sha256(manifest).hexdigest()
    if not final.exists():
        try:
            with atomic_write(final) as arriving:
                arriving.mkdir()
                (arriving / MANIFEST_NAME).write_bytes(manifest)
                # Checked whole before anything that it names is written.
                for shard in read_manifest(arriving).shards:
                    _fetch(store, f"{root.rstrip('/')}/{shard.name}", shard, arriving / shard.name, url)
        except OSError:
            if not final.exists():  # else another process was faster, and its copy is as good
                raise
    return str(final)


def _fetch(store: Any, source: str, shard: Shard, target: Path, url: str) -> None:
    with refusing(f"{url}/{shard.name} cannot be read", "check the store and start again", OSError):
        store.get_file(source, str(target))
    if describe_shard(target, shard.count) != shard:
        raise InputError(f"{url}/{shard.name} differs from the digest in {MANIFEST_NAME}: upload the shard set again")
