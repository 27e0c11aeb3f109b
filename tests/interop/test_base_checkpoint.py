"""A checkpoint of the published size goes in and out, quickly, in little memory and without changing a bit."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from infmae_jax.interop import safetensors_file
from tests.interop import published_format, torch_like

MAX_SECONDS, MAX_BYTES = 60, 3 << 30

# Runs a command of the package as `python -m` does and reports what it took.
MEASURED = """
import json, pathlib, resource, runpy, sys, time
start = time.monotonic()
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as done:
    assert not done.code, done.code
status = pathlib.Path("/proc/self/status")
if status.exists():  # there, getrusage starts from the peak of the process that started this one
    peak = int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.monotonic() - start, "peak_bytes": peak}))
"""


SMALL = {"widths": (24, 36, 48), "depths": (2, 2, 4), "decoder_width": 64, "decoder_depth": 2}


@pytest.fixture(scope="module")
def state(request):
    """The published size with --long; by default a small one, whose time and memory are those of the program itself."""
    return published_format.random_state(published_format.BASE if request.config.getoption("--long") else SMALL)


def convert(*flags):
    command = [sys.executable, "-c", MEASURED, "infmae_jax.convert", *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_published_size():
    shapes = published_format.infmae_shapes(**published_format.BASE)
    positions = 14 * 14 * (published_format.BASE["widths"][-1] + published_format.BASE["decoder_width"])
    assert sum(math.prod(shape) for shape in shapes.values()) + positions == 96_717_696


def test_round_trip(tmp_path, state):
    tensors = {name: torch_like.tensor(array) for name, array in state.items()}
    torch_like.save(tmp_path / "in.pth", {"model": tensors, "epoch": 399})
    steps = [
        ("--from=torch", f"--input={tmp_path}/in.pth", f"--output={tmp_path}/run"),
        ("--from=run", f"--input={tmp_path}/run", "--to=safetensors", f"--output={tmp_path}/out.safetensors"),
    ]
    for flags in steps:
        took = convert(*flags)
        print(f"{flags[0]}: {took['seconds']:.1f} s, {took['peak_bytes'] / 2**30:.2f} GiB")
        assert took["seconds"] < MAX_SECONDS and took["peak_bytes"] < MAX_BYTES
    written, _ = safetensors_file.read_checkpoint(tmp_path / "out.safetensors")
    assert written.keys() == state.keys()
    for name, array in state.items():
        assert written[name].shape == array.shape and written[name].dtype == np.float32, name
        assert written[name].tobytes() == array.tobytes(), name
