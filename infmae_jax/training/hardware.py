"""What the machine can do and how much of it is used: peak rates, model FLOPs utilisation, memory."""

import jax

# Dense matrix products, FLOP/s of one device, without structured sparsity. From the vendors' public data sheets:
# NVIDIA V100, A100, L4, H100, H200 and HGX B200; Google Cloud TPU v4, v5e, v5p and v6e (system architecture pages).
# Where a sheet gives only the rate with 2:4 sparsity, half of it. First matching name counts, so special forms precede.
_NVIDIA = ("float16", "bfloat16", "tf32", "float32")
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("b200", dict(zip(_NVIDIA, (2250.0, 2250.0, 1125.0, 75.0)))),
    ("h200 nvl", dict(zip(_NVIDIA, (835.5, 835.5, 417.5, 60.0)))),
    ("h200", dict(zip(_NVIDIA, (989.5, 989.5, 494.5, 67.0)))),
    ("h100 nvl", dict(zip(_NVIDIA, (835.5, 835.5, 417.5, 60.0)))),
    ("h100 pcie", dict(zip(_NVIDIA, (756.5, 756.5, 378.0, 51.0)))),
    ("h100", dict(zip(_NVIDIA, (989.5, 989.5, 494.5, 67.0)))),
    ("a100", dict(zip(_NVIDIA, (312.0, 312.0, 156.0, 19.5)))),
    ("l4", dict(zip(_NVIDIA, (121.0, 121.0, 60.0, 30.3)))),
    ("v100-pcie", {"float16": 112.0, "float32": 14.0}),
    ("v100", {"float16": 125.0, "float32": 15.7}),
    ("tpu v6 lite", {"bfloat16": 918.0}),
    ("tpu v6e", {"bfloat16": 918.0}),
    ("tpu v5 lite", {"bfloat16": 197.0}),
    ("tpu v5e", {"bfloat16": 197.0}),
    ("tpu v5p", {"bfloat16": 459.0}),
    ("tpu v5", {"bfloat16": 459.0}),
    ("tpu v4", {"bfloat16": 275.0}),
)
_GIB = 2**30


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak rate of dense matrix products in FLOP/s of one device, or None where no data sheet has it (CPUs; float64).

    Args:
      device_kind: `jax.Device.device_kind`, e.g. "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
      dtype: of the factors, "bfloat16", "float16", "tf32" or "float32". The last means how JAX multiplies float32 by
        default: in TF32 on NVIDIA GPUs that have it, in bfloat16 on TPUs. With jax_default_matmul_precision="float32"
        the peak is lower.
    """
    words = device_kind.lower().replace("nvidia ", "").replace("tesla ", "")
    if " mig " in f"{words} ":  # a part of a GPU, of which the name does not say the rate
        return None
    for name, rates in _PEAK_TFLOPS:
        if words == name or words.startswith((f"{name} ", f"{name}-")):
            default = ("tf32", "float32") if "float32" in rates else ("bfloat16",)
            usable = default if dtype == "float32" else (dtype,)
            found = next((rates[each] for each in usable if each in rates), None)
            return found and found * 1e12
    return None


def mfu(flops_per_step: float, seconds_per_step: float, device_kind: str, devices: int, dtype: str) -> float | None:
    """Model FLOPs utilisation, 0 to 1: FLOP of the model in a step / (seconds x peak rate of all devices).

    The definition of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): useful operations only, forward and
    backward of what the model computes, so that recomputation (rematerialisation) lowers it.

    Args:
      flops_per_step: floating-point operations of a step over all devices, a multiply-add being two.
      seconds_per_step: wall time.
      device_kind, dtype: see `peak_flops`.
      devices: how many take part.

    Returns:
      None where the peak rate is not known.
    """
    peak = peak_flops(device_kind, dtype)
    if peak is None or not (flops_per_step > 0 and seconds_per_step > 0):
        return None
    return flops_per_step / (seconds_per_step * peak * devices)


def device_memory_gib() -> float | None:
    """Most memory that was in use at once on any device of this process, GiB; None where the device does not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) / _GIB if known else None
