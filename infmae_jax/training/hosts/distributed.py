"""Several processes as one job: found, checked, watched. Nothing here runs when `distributed.method` is "none"."""

import contextlib
import hashlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.commands import EXIT_INTERRUPTED
from data_pipelines.errors import InputError
from infmae_jax.training.config import DistributedConfig, flat
from infmae_jax.training.hosts.peers import NoPeers, Peers, bind_host, meet
from infmae_jax.training.run_folder import package_versions

# How JAX calls the ways in which it finds out about a job.
_DETECTION = {"tpu": ("gketpu", "gcetpu"), "slurm": ("slurm",), "open_mpi": ("ompi",)}
_LOCAL_KEYS = ("distributed.", "data.shards", "data.workers", "data.threads", "compilation_cache")


@contextlib.contextmanager
def joined(config: DistributedConfig, settings: ConfigDict, data: Mapping[str, Any]) -> Iterator[Peers | NoPeers]:
    """Joins this process to its job, before anything uses a device.

    All processes must agree on config (paths and speed keys left out), source code, package versions and data set;
    afterwards on the number of devices. When this process fails, the others hear of it and end with the same exit
    code; when another one dies, hangs or fails, this one ends.

    Args:
      config: how to find the others.
      settings: the whole resolved config.
      data: what identifies the data set.

    Raises:
      InputError: a wrong setting, or processes that do not agree.
      peers.ProcessesMissing: not all arrived within `config.timeout_seconds`.
    """
    if config.method == "none":
        yield NoPeers()
        return
    (host, port), count, index, local_devices = _place(config)
    # The port below: those that JAX picks reach up to the last one.
    peers = meet((host, port - 1), index, count, _facts(settings, data), config)
    bind = bind_host(host)
    try:
        jax.distributed.initialize(
            f"{host}:{port}",
            count,
            index,
            local_devices,
            initialization_timeout=config.timeout_seconds,
            coordinator_bind_address=f"{bind}:{port}" if bind else None,
            # Our own message is to come first: JAX ends a process without saying why.
            heartbeat_timeout_seconds=2 * config.heartbeat_seconds,
        )
        _check_devices()
        yield peers
    except BaseException as error:
        code, message = _verdict(error)
        peers.fail(code, message)
        if code == 1:
            traceback.print_exception(error)
        print(f"error: {message}", file=sys.stderr, flush=True)
        # JAX's own goodbye would wait for processes that have ended.
        os._exit(code)
    peers.close()
    jax.distributed.shutdown()


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, InputError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    return 1, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _place(config: DistributedConfig) -> tuple[tuple[str, int], int, int, list[int] | None]:
    """(host, port) of the coordinator, number of processes, this one's index, its devices (None: all it sees)."""
    if config.method == "addresses":
        coordinator, count, index, devices = config.coordinator, config.num_processes, config.process_id, None
    else:
        coordinator, count, index, devices = _detected(config)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 1 < int(port) < 65536:
        raise InputError(f"distributed.coordinator={coordinator!r} must be HOST:PORT of process 0")
    if not 0 <= index < count:
        raise InputError(
            f"distributed.process_id={index} must be from 0 to num_processes - 1, num_processes is {count}"
        )
    return (host, int(port)), count, index, devices


def _detected(config: DistributedConfig) -> tuple[str, int, int, list[int] | None]:
    """What JAX finds out from the platform's environment; the address is needed before JAX itself connects."""
    from jax._src.clusters import ClusterEnv  # the only place that knows, with no public name

    logging.getLogger("jax._src.clusters").setLevel(logging.CRITICAL)  # our own message says it all
    known = {kind.name: kind for kind in ClusterEnv._cluster_types}
    for method in _DETECTION[config.method]:
        with contextlib.suppress(RuntimeError, KeyError, ValueError, OSError):  # the last: no metadata server
            if not known[method].is_env_present():
                continue  # JAX would ask all the same, and wait for hosts that are not there
            found = ClusterEnv.auto_detect_unset_distributed_params(
                config.coordinator or None, None, None, None, method, config.timeout_seconds
            )
            if None not in found[:3]:
                return found
    if config.method == "tpu":
        problem = "cannot be: this is not on a TPU VM (or libtpu or its metadata server is missing); start it on one"
    else:
        problem = "finds no such job around this process; start it with that launcher"
    raise InputError(f"distributed.method={config.method} {problem}, or use distributed.method=addresses")


def _facts(settings: ConfigDict, data: Mapping[str, Any]) -> dict[str, str]:
    """What all processes must agree on."""
    facts = {f"package {name}": version for name, version in package_versions().items()}
    facts |= {f"config {key}": value for key, value in flat(settings).items() if not key.startswith(_LOCAL_KEYS)}
    return facts | {"source code": source_digest(), "data set": str(dict(data))}


def source_digest() -> str:
    """SHA-256 over this project's Python files: which code runs, whatever its version is called."""
    root = Path(__file__).resolve().parents[3]
    digest = hashlib.sha256()
    for package in ("data_pipelines", "infmae_jax"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _check_devices() -> None:
    found = [device.process_index for device in jax.devices()]
    counts = [found.count(index) for index in range(jax.process_count())]
    if len(set(counts)) > 1:
        listing = ", ".join(f"process {i} has {n}" for i, n in enumerate(counts))
        raise InputError(f"processes see different numbers of devices: {listing}; give each the same number")
