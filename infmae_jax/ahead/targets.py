"""Devices that are only described: TPU slices and GPUs by name, what each chip has, and how to find their compiler."""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from data_pipelines.errors import InputError

COMPILERS = "INFMAE_COMPILERS"  # environment variable: the folder of --compilers


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has, from the vendors' public data sheets.

    Attributes:
      kind: as `jax.Device.device_kind` says it.
      memory: bytes of device memory.
      bandwidth: of that memory, bytes/s.
      link: bytes/s that one device can send to the others of its slice or host, all links together.
      clock: cycles/s of a TPU's core; 0 for GPUs, whose compiler estimates none.
      cores: TensorCores of a chip, by which Google Cloud counts slices of v4 and v5p.
    """

    kind: str
    memory: int
    bandwidth: float
    link: float
    clock: float = 0.0
    cores: int = 1


# Google Cloud TPU system architecture pages; NVIDIA's data sheet of the H100 SXM. Clocks follow from the peak rate of
# bfloat16 products (`hardware.peak_flops`) and the multipliers: 4 units of 128 x 128 a core on v4, v5e and v5p, of
# 256 x 256 on v6e, two operations each a cycle.
CHIPS = {
    "v4": Chip("TPU v4", 32 * 2**30, 1.228e12, 300e9, 275e12 / (8 * 128**2 * 2), cores=2),
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 200e9, 197e12 / (4 * 128**2 * 2)),
    "v5p": Chip("TPU v5", 95 * 10**9, 2.765e12, 600e9, 459e12 / (8 * 128**2 * 2), cores=2),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1.64e12, 448e9, 918e12 / (4 * 256**2 * 2)),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80 * 2**30, 3.35e12, 450e9),
}
_MOST_IN_SPACE, _MOST_IN_A_PLANE, _MOST_GPUS = 4096, 256, 1024  # powers of two: chips of v4 and v5p, v5e and v6e
_GPUS_A_HOST = 8
_GPU_NETWORK = 50e9  # bytes/s of one GPU between hosts: a 400 Gb/s port each, assumed
# XLA's GpuTargetConfigProto of an H100 SXM.
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GPU_PACKAGES = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-nvjitlink nvidia-cuda-nvrtc"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as the user says it, e.g. "v5e-16".
      generation: of `CHIPS`.
      shape: chips along each axis of the slice; (GPUs,) for GPUs.
    """

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def gpu(self) -> bool:
        return self.generation == "h100"

    @property
    def link(self) -> float:
        """Bytes/s that a device can send: over its own links, or its host's network where GPUs are on several hosts."""
        return _GPU_NETWORK if self.gpu and self.shape[0] > _GPUS_A_HOST else self.chip.link

    def devices(self, compilers: str) -> list[jax.Device]:
        """Devices that programs can be compiled for, with the compilers in a folder or in the environment itself.

        Raises:
          InputError: the compiler is not installed; the line says how to install it into a folder of its own.
        """
        find = _find_gpu_compiler if self.gpu else _find_tpu_compiler
        folder = Path(compilers or os.environ.get(COMPILERS, ""))
        if not find(folder):
            what = "the CUDA plugin" if self.gpu else "libtpu"
            packages = _gpu_packages() if self.gpu else [_pinned("jax", "libtpu")]
            given = f" (none in {folder})" if str(folder) != "." else ""
            raise InputError(
                f"compiling for {self.name} needs {what}{given}: pip install --no-deps --target FOLDER "
                f"{' '.join(packages)}, then give --compilers=FOLDER or set {COMPILERS}=FOLDER"
            )
        return list(self._topology().devices)

    def _topology(self) -> topologies.TopologyDescription:
        shape = "x".join(map(str, self.shape))
        if self.gpu:
            hosts, each = max(1, self.shape[0] // _GPUS_A_HOST), min(self.shape[0], _GPUS_A_HOST)
            return topologies.get_topology_desc(
                "h100", platform="cuda", target_config=_H100, topology=f"1x{hosts}x{each}"
            )
        options: dict[str, Any] = {}
        if self.shape == (1, 1):
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.generation == "v4":
            options["chip_config_name"] = "megacore"  # a chip's two cores are one device, as on v5p
        return topologies.get_topology_desc(f"{self.generation}:{shape}", platform="tpu", **options)


def target(name: str) -> Target:
    """Of a name: v5e-16, v6e-64 (chips), v4-32, v5p-128 (cores, two a chip, as Google Cloud counts), h100, h100x8.

    Raises:
      InputError: no such slice or GPU; the line names the nearest.
    """
    text = name.lower().replace("v5litepod", "v5e")
    found = re.fullmatch(r"(h100)(?:x(\d+))?|(v\d\w?)-(\d+)", text)
    if found:
        generation = found[1] or found[3]
        if text in _known():
            return Target(name, generation, _known()[text])
    near = difflib.get_close_matches(text, _known(), n=3, cutoff=0.4) or ["v5e-16", "v5p-128", "v6e-64", "h100"]
    if found and generation in CHIPS:
        wanted = int(found[2] or found[4] or 1)
        sizes = [each for each in _known() if each.startswith(generation) and each != generation]
        near = sorted(sizes, key=lambda each: abs(int(re.split(r"[-x]", each)[-1]) - wanted))[:3]
    raise InputError(f"--topology={name} is not known: the nearest are {', '.join(near)}")


def _known() -> dict[str, tuple[int, ...]]:
    """Every name of a slice or of GPUs -> its shape."""
    names: dict[str, tuple[int, ...]] = {"h100": (1,)}
    for count in (2**n for n in range(_MOST_IN_SPACE.bit_length())):
        if count <= _MOST_GPUS:
            names[f"h100x{count}"] = (count,)
        if count <= _MOST_IN_A_PLANE and count != 2:
            names |= {f"{each}-{count}": _shape(count, 2) for each in ("v5e", "v6e")}
        if count >= 4:
            names |= {f"{each}-{count * CHIPS[each].cores}": _shape(count, 3) for each in ("v4", "v5p")}
    return names


def _shape(chips: int, axes: int) -> tuple[int, ...]:
    """Of a slice of a power of two chips: the longest side last, but four chips in space lie in one plane."""
    bits = chips.bit_length() - 1
    sides = tuple(2 ** ((bits + place) // axes) for place in range(axes))
    return (2, 2, 1) if sides == (1, 2, 2) else sides


def _find_tpu_compiler(folder: Path) -> bool:
    """Tells JAX where libtpu is and that there is no TPU here to ask or to lock."""
    library = folder / "libtpu" / "libtpu.so"
    if library.is_file():
        os.environ["TPU_LIBRARY_PATH"] = str(library)
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):  # fmt: skip
        os.environ.setdefault(variable, value)
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def _find_gpu_compiler(folder: Path) -> bool:
    if (folder / "jax_plugins").is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12)
    )


def _gpu_packages() -> list[str]:
    version = importlib.metadata.version("jax")
    return [f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}", *_GPU_PACKAGES.split()]


def _pinned(package: str, dependency: str) -> str:
    """How a package pins one of its dependencies: 'libtpu==0.0.42.*'."""
    lines = importlib.metadata.requires(package) or []
    pinned = next((line.split(";")[0].strip() for line in lines if line.startswith(dependency)), dependency)
    return f"'{pinned}'"
