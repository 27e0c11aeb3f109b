"""Reading torch checkpoints: every layout torch writes, nothing that runs code, one clear line for what is broken."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from infmae_jax.interop import pickle_data, torch_file
from tests.interop import torch_like

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(3, 2, 4)).astype(np.float32)
BIAS = RNG.normal(size=5)


def assert_equal(got, expected):
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapped", [True, False])
def test_reads_state_dicts(tmp_path, protocol, wrapped):
    state = collections.OrderedDict(weight=torch_like.tensor(WEIGHT), bias=torch_like.tensor(BIAS))
    item = {"model": state, "epoch": 7, "note": "é"} if wrapped else state
    torch_like.save(tmp_path / "c.pth", item, protocol)
    tensors, extras = torch_file.read_checkpoint(tmp_path / "c.pth")
    assert_equal(tensors, {"weight": WEIGHT, "bias": BIAS})
    assert extras == ({"epoch": 7, "note": "é"} if wrapped else {})


def test_reads_the_format_before_torch_1_6(tmp_path):
    item = {"model": {"weight": torch_like.tensor(WEIGHT), "bias": torch_like.tensor(BIAS)}}
    torch_like.save_legacy(tmp_path / "c.pth", item)
    assert_equal(torch_file.read_checkpoint(tmp_path / "c.pth")[0], {"weight": WEIGHT, "bias": BIAS})
    data = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(data[:-3])
    last = BIAS.tobytes()
    assert data.endswith(last)
    (tmp_path / "false.pth").write_bytes(data[: -len(last) - 8] + struct.pack("<Q", 1 << 63) + last)
    for name in ("short.pth", "false.pth"):
        with pytest.raises(InputError, match=f"{name} is truncated"):
            torch_file.read_checkpoint(tmp_path / name)


def test_keys_of_the_older_format_are_text(tmp_path):
    """The text of lists that share their parts would have no end."""
    header, _ = torch_like.pickle_objects([torch_like.LEGACY_MAGIC, 1001, {"little_endian": True}, {}])
    nested = b"\x80\x02]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(1, 61)) + b"."
    (tmp_path / "c.pth").write_bytes(header + nested)
    with pytest.raises(InputError, match="its header is damaged"):
        torch_file.read_checkpoint(tmp_path / "c.pth")


def test_views_share_a_storage(tmp_path):
    flat = np.arange(24, dtype=np.float32)
    views = {
        "whole": torch_like.Tensor(flat, (4, 6)),
        "transposed": torch_like.Tensor(flat, (6, 4), (1, 6)),
        "row": torch_like.Tensor(flat, (6,), (1,), offset=12),
        "scalar": torch_like.Tensor(flat, (), (), offset=5),
        "empty": torch_like.Tensor(flat, (0, 3), (3, 1), offset=24),
    }
    torch_like.save(tmp_path / "c.pth", views)
    expected = {
        "whole": flat.reshape(4, 6),
        "transposed": flat.reshape(4, 6).T,
        "row": flat[12:18],
        "scalar": flat[5],
        "empty": np.zeros((0, 3), np.float32),
    }
    assert_equal(torch_file.read_checkpoint(tmp_path / "c.pth")[0], expected)


def test_other_byte_order(tmp_path):
    pickled, _ = torch_like.pickle_objects([{"weight": torch_like.tensor(WEIGHT)}])
    torch_like.save_raw(tmp_path / "c.pth", pickled, {"0": WEIGHT.astype(">f4").tobytes()}, byteorder=b"big")
    assert_equal(torch_file.read_checkpoint(tmp_path / "c.pth")[0], {"weight": WEIGHT})


def test_arguments_and_optimizer_beside_the_model_are_ignored(tmp_path):
    arguments = argparse.Namespace(lr=0.1, data_path="/data")
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch_like.tensor(BIAS)}}, "param_groups": [{"params": [0]}]}
    item = {"model": {"weight": torch_like.tensor(WEIGHT)}, "optimizer": optimizer, "args": arguments, "epoch": 1}
    torch_like.save(tmp_path / "c.pth", item)
    tensors, extras = torch_file.read_checkpoint(tmp_path / "c.pth")
    assert_equal(tensors, {"weight": WEIGHT})
    assert extras == {"epoch": 1}


class Attack:
    """Pickles as a call; loaded by `pickle`, it makes a file."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(canary):
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Attack(os.system, f"touch {canary}"),
        "exec": Attack(exec, code),
        "eval": Attack(eval, code.replace("open", "__import__('builtins').open")),
        "popen": Attack(subprocess.Popen, ["touch", str(canary)]),
        "getattr": Attack(getattr, "", "join"),
    }


@pytest.mark.parametrize("attack", ["system", "exec", "eval", "popen", "getattr"])
@pytest.mark.parametrize("place", ["top", "model", "beside", "dict key", "storage"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, attack, place, protocol):
    canary = tmp_path / "ran"
    bomb = attacks(canary)[attack]
    good = torch_like.tensor(WEIGHT)
    item = {
        "top": bomb,
        "model": {"model": {"weight": good, "bomb": bomb}},
        "beside": {"model": {"weight": good}, "args": bomb},
        "dict key": {"model": {"weight": good}, ("key", bomb): 1},
        "storage": {"model": {"weight": torch_like.Tensor(np.zeros(1, np.float32), (1,), offset=bomb)}},
    }[place]
    torch_like.save(tmp_path / "c.pth", item, protocol)
    with pytest.raises(InputError) as refused:
        torch_file.read_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(refused.value)
    assert "asks to import" in str(refused.value) or "instruction" in str(refused.value)
    assert not canary.exists()


def test_the_attack_of_these_tests_is_real(tmp_path):
    pickle.loads(pickle.dumps(attacks(tmp_path / "ran")["system"]))
    assert (tmp_path / "ran").exists()


HANDWRITTEN = {
    "inst": b"(S'touch {canary}'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch {canary}'\no.",
    "extension registry": b"\x82\x01.",
    "dunder of a known class": b"ccollections\nOrderedDict.__init__.__globals__\n)R.",
    "stack global": b"\x8c\x02os\x8c\x06system\x93\x8c\x10touch {canary}\x85R.",
    "call of a value": b"}(S'a'\nI1\nu)R.",
    "state of a storage": b"ctorch\nFloatStorage\n}S'x'\nI1\nsb.",
    "build before reduce": b"(S'touch {canary}'\ncos\nsystem\nb.",
    "unknown module": b"cinfmae_jax.convert\nmain\n(]tR.",
}


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten_pickles_are_refused(tmp_path, name):
    canary = tmp_path / "ran"
    torch_like.save_raw(tmp_path / "c.pth", HANDWRITTEN[name].replace(b"{canary}", str(canary).encode()))
    with pytest.raises(InputError, match="c.pth"):
        torch_file.read_checkpoint(tmp_path / "c.pth")
    assert not canary.exists()


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200))
def test_random_pickles_are_values_or_refused(data):
    try:
        pickle_data.read_pickle(io.BytesIO(data))
    except pickle_data.PickleRefused as refused:
        assert "\n" not in str(refused)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_end_in_one_line(tmp_path, data):
    """Bit flips and cuts of a sound file: it is read unchanged or refused, nothing else."""
    path = tmp_path / "c.pth"
    torch_like.save(path, {"model": {"weight": torch_like.tensor(WEIGHT), "bias": torch_like.tensor(BIAS)}})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors, _ = torch_file.read_checkpoint(path)
    except InputError as refused:
        assert "\n" not in str(refused) and "c.pth" in str(refused)
    else:
        assert_equal(tensors, {"weight": WEIGHT, "bias": BIAS})


BROKEN = {
    "text": (b"learning_rate: 0.1\n", "not a torch checkpoint"),
    "empty": (b"", "not a torch checkpoint"),
    "bare pickle": (pickle.dumps({"model": 1}), "not a torch checkpoint"),
    "picture": (b"\xff\xd8\xff\xe0" + bytes(100), "not a torch checkpoint"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_other_files(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        torch_file.read_checkpoint(tmp_path / "c.pth")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="absent.pth cannot be read"):
        torch_file.read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="cannot be read"):
        torch_file.read_checkpoint(tmp_path)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("images/a.png", b"")
    with pytest.raises(InputError, match="no torch checkpoint"):
        torch_file.read_checkpoint(tmp_path / "c.pth")


def test_tensor_that_reaches_outside_its_storage(tmp_path):
    flat = np.zeros(6, np.float32)
    for bad in (
        torch_like.Tensor(flat, (7,)),
        torch_like.Tensor(flat, (2,), (6,)),
        torch_like.Tensor(flat, (2,), (1,), 5),
        torch_like.Tensor(flat, (1 << 40,), (0,)),
    ):
        torch_like.save(tmp_path / "c.pth", {"weight": bad})
        with pytest.raises(InputError, match="tensor weight reaches outside its storage"):
            torch_file.read_checkpoint(tmp_path / "c.pth")
    for bad in (
        torch_like.Tensor(flat, (2, 3), (1,)),
        torch_like.Tensor(flat, (-2, -3)),
        torch_like.Tensor(flat, (2.0,), (1,)),
    ):
        torch_like.save(tmp_path / "c.pth", {"weight": bad})
        with pytest.raises(InputError, match="a tensor with an impossible shape"):
            torch_file.read_checkpoint(tmp_path / "c.pth")


def test_storage_that_is_not_there(tmp_path):
    pickled, _ = torch_like.pickle_objects([{"weight": torch_like.tensor(WEIGHT)}])
    torch_like.save_raw(tmp_path / "c.pth", pickled, {})
    with pytest.raises(InputError, match="storage 0 are not in the file"):
        torch_file.read_checkpoint(tmp_path / "c.pth")
    torch_like.save_raw(tmp_path / "c.pth", pickled, {"0": b"1234"})
    with pytest.raises(InputError, match="truncated or damaged"):
        torch_file.read_checkpoint(tmp_path / "c.pth")


def test_what_torch_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed; it is no dependency, only a check")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(2, 3, 5)).half()
    optimizer = torch.optim.AdamW(module.parameters())
    sum(p.float().sum() for p in module.parameters()).backward()
    optimizer.step()
    item = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=1)}
    for name, zipped in (("zip.pth", True), ("legacy.pth", False)):
        torch.save(item, tmp_path / name, _use_new_zipfile_serialization=zipped)
        read, _ = torch_file.read_checkpoint(tmp_path / name)
        assert_equal(read, {name: tensor.numpy() for name, tensor in module.state_dict().items()})
