"""Peak rates against the vendors' data sheets, utilisation by hand, memory against the operating system."""

import jax
import pytest

from infmae_jax.training import hardware


@pytest.mark.parametrize(
    "kind, bfloat16, float32",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H100 NVL", 835.5e12, 417.5e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("Tesla V100-PCIE-32GB", None, 14e12),
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5e", 197e12, 197e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("cpu", None, None),
        ("NVIDIA L40S", None, None),
        ("NVIDIA GB200", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("TPU v5x", None, None),
        ("", None, None),
    ],
)
def test_peak_rates(kind, bfloat16, float32):
    assert hardware.peak_flops(kind, "bfloat16") == bfloat16
    assert hardware.peak_flops(kind, "float32") == float32


def test_tf32_can_be_asked_for_and_other_formats_have_no_rate():
    assert hardware.peak_flops("NVIDIA A100-SXM4-40GB", "tf32") == 156e12
    assert hardware.peak_flops("Tesla V100-SXM2-16GB", "float16") == 125e12
    assert hardware.peak_flops("TPU v4", "tf32") is None
    assert hardware.peak_flops("TPU v4", "float64") is None and hardware.peak_flops("cpu", "float64") is None


def test_utilisation_by_hand():
    # 8 A100 make 8 * 312e12 FLOP/s; 2048 images of 45 GFLOP in 0.1 s are 921.6e12 FLOP/s.
    used = hardware.mfu(2048 * 45e9, 0.1, "NVIDIA A100-SXM4-80GB", 8, "bfloat16")
    assert used == pytest.approx(921.6 / (8 * 312))
    assert hardware.mfu(1e12, 1.0, "cpu", 1, "float32") is None
    assert hardware.mfu(0.0, 1.0, "TPU v4", 1, "bfloat16") is None  # the compiler did not count


def test_device_memory_is_the_fullest_device_and_absent_where_unknown(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert hardware.device_memory_gib() is None  # CPU devices do not say
    devices = [Device({"peak_bytes_in_use": 3 << 30}), Device({"peak_bytes_in_use": 5 << 30}), Device(None), Device({})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert hardware.device_memory_gib() == 5.0
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
    assert hardware.device_memory_gib() is None
