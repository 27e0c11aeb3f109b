"""An exported feature path runs with JAX alone: any batch, every platform it names, the model's own numbers."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.convert import convert
from infmae_jax.interop.load import load
from infmae_jax.models.infmae import InfMAE
from tests.interop import torch_like
from tests.interop.published_format import TINY, TINY_HEADS, random_state

# Runs in an empty folder, isolated from the environment; an import of this package or of Flax would fail loudly.
CONSUMER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("infmae_jax", "data_pipelines", "flax"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
import jax
import numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}, exported.platforms
images = np.load(sys.argv[2])
for count in (1, 2, len(images)):
    features = exported.call(images[:count])
    assert all(array.shape[0] == count for array in features.values())
np.savez(sys.argv[3], **features)
"""


@pytest.mark.parametrize("mae", [False, True], ids=["hybrid", "vit"])
def test_runs_without_this_package(tmp_path, mae):
    state = random_state(TINY, mae, grid=(2, 2))
    torch_like.save(tmp_path / "c.pth", {name: torch_like.tensor(array) for name, array in state.items()})
    convert("torch", "jax-export", tmp_path / "c.pth", tmp_path / "f.stablehlo", image_size=(48, 64), **TINY_HEADS)
    exported = (tmp_path / "f.stablehlo").read_bytes()
    for word in (str(tmp_path), "/home", sys.prefix, ".py", "site-packages"):
        assert word.encode() not in exported, word
    images = np.random.default_rng(0).normal(size=(3, 48, 64, 1)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "empty").mkdir()
    names = ("f.stablehlo", "images.npy", "features.npz")
    done = subprocess.run(
        [sys.executable, "-I", "-c", CONSUMER, *(str(tmp_path / name) for name in names)],
        check=False,
        cwd=tmp_path / "empty",
        env={"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    checkpoint = load(tmp_path / "c.pth", **TINY_HEADS)
    features = jax.jit(lambda v, x: InfMAE(checkpoint.config).apply(v, x, method="features"))
    expected = features({"params": checkpoint.params}, images)
    with np.load(tmp_path / "features.npz") as got:
        assert set(got) == set(expected)
        for name in got:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5, err_msg=name)


def test_image_size_must_fit_the_patches(tmp_path):
    state = random_state(TINY, grid=(2, 2))
    torch_like.save(tmp_path / "c.pth", {name: torch_like.tensor(array) for name, array in state.items()})
    with pytest.raises(InputError, match="100x64"):
        convert("torch", "jax-export", tmp_path / "c.pth", tmp_path / "f", image_size=(100, 64), **TINY_HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]
