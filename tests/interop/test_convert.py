"""The convert command as its users run it: every direction, and one line for every mistake."""

import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags

import infmae_jax
from data_pipelines.errors import InputError
from infmae_jax.convert import _define_flags, convert
from infmae_jax.interop import safetensors_file, torch_file
from tests import commands
from tests.interop import torch_like
from tests.interop.published_format import TINY, TINY_HEADS, random_state

HEAD_FLAGS = [f"--{name}={count}" for name, count in TINY_HEADS.items()]


def command(*flags):
    return commands.run("infmae_jax.convert", *flags)


def save(path, state, **beside):
    torch_like.save(path, {"model": {name: torch_like.tensor(array) for name, array in state.items()}, **beside})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same random model as published .pth, run folder and .safetensors; made through the command line."""
    folder = tmp_path_factory.mktemp("files")
    save(folder / "published.pth", random_state(TINY, grid=(4, 6)), epoch=399)
    steps = [
        ("--from=torch", f"--input={folder}/published.pth", f"--output={folder}/run", *HEAD_FLAGS),
        ("--from=run", f"--input={folder}/run", "--to=safetensors", f"--output={folder}/model.safetensors"),
    ]
    for arguments in steps:
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
        assert "hybrid encoder" in done.stdout and len(done.stdout.splitlines()) == 1
    return folder


def assert_same_tree(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_load_gives_the_same_model_from_every_format(files):
    model, params = infmae_jax.load(files / "published.pth", **TINY_HEADS)
    for name in ("run", "model.safetensors"):
        other, other_params = infmae_jax.load(files / name)
        assert other.config == model.config
        assert_same_tree(other_params, params)
    images = np.random.default_rng(0).normal(size=(2, 48, 64, 1)).astype(np.float32)
    out = model.apply({"params": params}, images, np.array([[0, 5], [11, 3]], np.int32))
    assert out.pred.shape == (2, 12, 768) and out.latent.shape == (2, 2, 16) and np.isfinite(out.loss)
    feats = model.apply({"params": params}, images, method="features")
    assert {name: array.shape for name, array in feats.items()} == {
        "stage1": (2, 12, 16, 8),
        "stage2": (2, 6, 8, 12),
        "stage3": (2, 3, 4, 16),
        "pooled": (2, 16),
    }


@pytest.mark.parametrize("through", [[], ["run"], ["run", "safetensors", "run"]])
def test_a_round_trip_is_bit_identical(files, tmp_path, through):
    source, path = "torch", files / "published.pth"
    for index, target in enumerate([*through, "safetensors"]):
        output = tmp_path / f"{index}.{target}"
        convert(source, target, path, output, **(TINY_HEADS if source == "torch" else {}))
        source, path = target, output
    state, _ = torch_file.read_checkpoint(files / "published.pth")
    written, _ = safetensors_file.read_checkpoint(path)
    assert written.keys() == state.keys()
    for name, array in state.items():
        assert written[name].tobytes() == array.tobytes() and written[name].shape == array.shape, name


def test_safetensors_file_has_the_published_names(files):
    state, _ = torch_file.read_checkpoint(files / "published.pth")
    tensors = safetensors.numpy.load_file(files / "model.safetensors")
    assert tensors.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(tensors[name], array)
    assert (files / "model.safetensors").stat().st_mode == (files / "published.pth").stat().st_mode


def test_bare_state_dict_and_optimizer_beside(files, tmp_path):
    state = random_state(TINY, grid=(4, 6))
    tensors = {name: torch_like.tensor(array) for name, array in state.items()}
    torch_like.save(tmp_path / "bare.pth", tensors)
    moments = {"state": {0: {"exp_avg": torch_like.tensor(state["norm.bias"])}}, "param_groups": []}
    torch_like.save(tmp_path / "full.pth", {"model": tensors, "optimizer": moments, "scaler": {"scale": 65536.0}})
    expected = infmae_jax.load(files / "run")[1]
    for name in ("bare.pth", "full.pth"):
        assert_same_tree(infmae_jax.load(tmp_path / name, **TINY_HEADS)[1], expected)


def bad_inputs(folder):
    """File name -> what its one line must name."""
    state = random_state(TINY, grid=(2, 2))
    save(folder / "good.pth", state)
    content = (folder / "good.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(content[: len(content) // 2])
    (folder / "text.pth").write_text("lr: 0.001\nepochs: 400\n")
    half = {name: array for index, (name, array) in enumerate(state.items()) if index % 2}
    save(folder / "half.pth", half)
    save(folder / "resnet.pth", {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})
    save(folder / "misshaped.pth", state | {"norm.bias": np.zeros(15, np.float32)})
    return {
        "truncated.pth": "truncated or damaged",
        "text.pth": "not a torch checkpoint",
        "half.pth": "missing",
        "resnet.pth": "not the state dict of an InfMAE or MAE model",
        "misshaped.pth": "norm.bias (15,), not (16,)",
        "absent.pth": "is not a file",
    }


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    for name, message in bad_inputs(tmp_path).items():
        with pytest.raises(InputError) as refused:
            convert("torch", "run", tmp_path / name, tmp_path / "out" / "run", **TINY_HEADS)
        assert name in str(refused.value) and message in str(refused.value) and "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["truncated.pth", "half.pth"])
def test_the_command_ends_with_exit_code_2(tmp_path, name):
    message = bad_inputs(tmp_path)[name]
    done = command("--from=torch", f"--input={tmp_path}/{name}", f"--output={tmp_path}/run", *HEAD_FLAGS)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert name in done.stderr and message in done.stderr
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("*.partial*"))


def test_an_attack_through_the_command_runs_nothing(tmp_path):
    code = f"c__builtin__\nexec\n(S\"open('{tmp_path}/ran', 'w')\"\ntR."
    torch_like.save_raw(tmp_path / "attack.pth", code.encode())
    done = command("--from=torch", f"--input={tmp_path}/attack.pth", f"--output={tmp_path}/run")
    assert done.returncode == 2 and "__builtin__.exec" in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attack.pth"]


def test_wrong_source_and_existing_output(files, tmp_path):
    cases = [
        ("run", files / "published.pth", "is not a run folder"),
        ("run", tmp_path / "absent", "is not a run folder"),
        ("torch", files / "run", "is not a file"),
        ("torch", files / "model.safetensors", "not a torch checkpoint"),
        ("safetensors", files / "published.pth", "no sound safetensors file"),
    ]
    for source, path, message in cases:
        with pytest.raises(InputError, match=message):
            convert(source, "run", path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already exists"):
        convert("run", "run", files / "run", tmp_path / "out")


def test_truncated_safetensors(files, tmp_path):
    content = (files / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(InputError, match="cut.safetensors is no sound safetensors file"):
        infmae_jax.load(tmp_path / "cut.safetensors")


def test_a_failed_write_leaves_nothing(files, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write_checkpoint", fail)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        convert("run", "safetensors", files / "run", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_scoring_convolution_of_a_changed_mask_is_not_kept(files, tmp_path):
    """A run whose mask was edited after import exports the edited mask, not the stale filters."""
    shutil.copytree(files / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"score": "kernel"', '"score": "gray_mean"'))
    convert("run", "safetensors", tmp_path / "run", tmp_path / "out")
    weight = safetensors_file.read_checkpoint(tmp_path / "out")[0]["patch_embed.proj.weight"]
    np.testing.assert_array_equal(weight, np.full_like(weight, 1 / 768))  # ascending, as the run


def test_the_help_says_which_checkpoint_is_taken():
    before = set(flags.FLAGS)
    try:
        _define_flags()
        assert "for --to=jax-export of a fine-tuned run the best on validation" in flags.FLAGS["step"].help
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def test_unknown_flags_and_arguments():
    for arguments in (
        ["--from=onnx", "--input=a", "--output=b"],
        ["--input=a"],
        ["--from=run", "--input=a", "--output=b", "c"],
    ):
        done = command(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
