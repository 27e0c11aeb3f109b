"""Builds a registered data set in one call, every mistake in one line."""

import dataclasses
import difflib
import errno
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines import builders
from data_pipelines.builders.common import InfraredBuilder, source_name
from data_pipelines.errors import InputError
from data_pipelines.files import local_path
from data_pipelines.shards import MANIFEST_NAME, WRITE_FAILED, read_manifest

_DISK_ERRORS = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.ENOENT
)  # fmt: skip


def build(
    name: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike,
    *,
    beam_options: Sequence[str] | None = None,
    shards: int | None = None,
) -> epath.Path:
    """Builds a registered data set.

    Args:
      name: of the builder, with its config if it has several: "image_folder", "image_folder/gray16".
      data_dir: TFDS data folder; the set goes below it.
      source: folder of the user's files (`manual_dir`).
      beam_options: build with Apache Beam and these pipeline options, for example ["runner=DirectRunner"]; None builds
        in this process.
      shards: shards per split; None leaves it to TFDS (by size).

    Returns:
      The version folder of what was built, or was there already from the same source: a shard set, whose manifest
      counts in its settings what was done to annotations (`notes`) and the files left out, by reason (`rejected`).

    Raises:
      InputError: no such builder, unusable files, or a set made from other files is in the way.
    """
    known = [getattr(builders, kind).name for kind in builders.__all__]
    if (asked := re.split("[/:]", name)[0]) not in known:
        near = difflib.get_close_matches(asked, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"data set {name!r} is unknown; {hint}")
    source, data_dir = Path(local_path(source, "input")), local_path(data_dir, "data_dir")
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: give the folder of your files or archives")
    if not any(source.iterdir()):
        raise InputError(f"{source} is empty: put your files there")
    if beam_options is not None and importlib.util.find_spec("apache_beam") is None:
        raise InputError("Apache Beam is not installed: pip install 'infmae-jax[beam]'")
    try:
        builder = tfds.builder(name, data_dir=data_dir, beam=beam_options is not None)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"data set {name!r} is unknown: {str(error).splitlines()[0]}") from error
    folder = builder.data_path
    if folder.exists():
        made = read_manifest(folder).settings.get("source") if (folder / MANIFEST_NAME).exists() else "elsewhere"
        if made != source_name(source):
            raise InputError(f"{folder} was made from {made}: choose another --data_dir")
    else:
        _generate(builder, source, beam_options, shards)
    return folder


def _generate(builder: InfraredBuilder, source: Path, beam_options: Sequence[str] | None, shards: int | None) -> None:
    config = tfds.download.DownloadConfig(manual_dir=source, num_shards=shards)
    if beam_options is not None:
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(flags=[f"--{option}" for option in beam_options])
        config = dataclasses.replace(config, beam_options=options)
    try:
        # Nothing is downloaded, yet TFDS wants a place for it: not one that stays in the user's data folder.
        with tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except Exception as error:
        mistake = _input_error(error, builder.data_path)
        raise error if mistake is None else mistake from error


def _input_error(error: BaseException | None, folder: epath.Path) -> InputError | None:
    """The user's mistake or a full disk in a chain of exceptions: TFDS and Beam raise their own around it."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        if (isinstance(error, OSError) and error.errno in _DISK_ERRORS) or WRITE_FAILED in str(error):
            reason = " ".join(str(error).split(";")[0].split())
            return InputError(f"{folder} cannot be written ({reason}): choose another --data_dir or free space")
        error = error.__cause__ or error.__context__
    return None
