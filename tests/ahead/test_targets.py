"""Names of devices, and what is said where their compiler is missing."""

import math

import pytest

from data_pipelines.errors import InputError
from infmae_jax.ahead import targets
from infmae_jax.training.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e-16", (4, 4)), ("v5litepod-8", (2, 4)), ("v5e-256", (16, 16)), ("v6e-64", (8, 8)), ("v4-8", (2, 2, 1)),
        ("v5p-128", (4, 4, 4)), ("v5p-32", (2, 2, 4)), ("v4-64", (2, 4, 4)), ("h100", (1,)), ("H100x8", (8,)),
    ],
)  # fmt: skip
def test_shapes_of_slices(name, shape):
    target = targets.target(name)
    assert target.shape == shape
    count = int(name.split("-")[1]) if "-" in name else math.prod(shape)
    assert math.prod(shape) * target.chip.cores == count  # Google Cloud counts the cores of v4 and v5p


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("v5e-17", "v5e-16, v5e-8"), ("v5p-100", "v5p-128"), ("h100x3", "h100x2"), ("v5d-16", "v5e-16"), ("", "v5e-16")],
)
def test_unknown_names_are_answered_by_the_nearest(name, nearest):
    with pytest.raises(InputError, match=nearest) as caught:
        targets.target(name)
    assert "\n" not in str(caught.value) and f"--topology={name}" in str(caught.value)


def test_clocks_belong_to_the_peak_rates():
    for chip in targets.CHIPS.values():
        assert peak_flops(chip.kind, "bfloat16") is not None
        if chip.clock:
            assert 0.9e9 < chip.clock < 2.0e9


@pytest.mark.parametrize(("name", "package"), [("v5e-4", "'libtpu=="), ("h100", "jax-cuda13-plugin==")])
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, name, package):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for variable in ("TPU_LIBRARY_PATH", targets.COMPILERS):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES",
                     "ALLOW_MULTIPLE_LIBTPU_LOAD"):  # fmt: skip
        monkeypatch.setenv(variable, "restored afterwards")
    with pytest.raises(InputError) as caught:
        targets.target(name).devices(str(tmp_path))
    line = str(caught.value)
    assert "\n" not in line and "pip install --no-deps --target FOLDER" in line and package in line
    assert "--compilers=FOLDER" in line and targets.COMPILERS in line


def test_between_hosts_gpus_send_over_the_network():
    assert targets.target("h100x8").link == 450e9 > targets.target("h100x16").link
