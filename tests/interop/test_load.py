"""One loader for runs and published files: features of any image, encoders alone, wrappers, grafting, hostile files."""

import collections
import functools
import json
import pathlib
import re
import resource
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import infmae_jax
from data_pipelines.errors import InputError
from data_pipelines.intensity import Intensity
from infmae_jax.convert import convert
from infmae_jax.interop import safetensors_file, torch_file
from infmae_jax.interop.load import graft, load_encoder, untrained
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import InfMAE, abstract_params
from infmae_jax.models.patches import normalize
from tests import commands
from tests.interop import torch_like
from tests.interop.published_format import TINY, TINY_HEADS, random_state

SMALL = variant("tiny", widths=(8, 12, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_heads=2)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    return untrained(SMALL)


def save(path, state, key="model"):
    tensors = {name: torch_like.tensor(array) for name, array in state.items()}
    torch_like.save(path, {key: tensors} if key else tensors)
    return path


def encoder_only(state):
    return {name: array for name, array in state.items() if not name.startswith(("decoder", "mask_token"))}


def test_a_model_is_shown_in_one_line(model):
    assert re.fullmatch(r"<random: hybrid, [\d,]+ parameters, images 224x224>", repr(model))


@pytest.mark.parametrize("size", [(1, 1), (15, 15), (17, 33), (32, 48)])
def test_features_of_any_size_are_those_of_the_padded_image(model, size):
    images = RNG.integers(0, 256, (2, *size), np.uint8)
    found = model.features(images)
    rows, columns = (-extent % 16 for extent in size)
    padded = np.pad(images, ((0, 0), (0, rows), (0, columns)), mode="edge")[..., None]
    features = jax.jit(functools.partial(InfMAE(SMALL).apply, method="features"))
    expected = features({"params": model.params}, normalize(padded))
    assert set(found) == {"stage1", "stage2", "stage3", "pooled"}
    for name, stride in (("stage1", 4), ("stage2", 8), ("stage3", 16)):
        extents = tuple(-(-extent // stride) for extent in size)
        assert found[name].shape[:3] == (2, *extents)
        cut = np.asarray(expected[name])[:, : extents[0], : extents[1]]
        np.testing.assert_allclose(found[name], cut, atol=1e-4)
    np.testing.assert_allclose(found["pooled"], expected["pooled"], atol=1e-4)


def test_forms_of_the_same_image_have_the_same_features(model):
    image = RNG.integers(0, 256, (20, 24), np.uint8)
    first = model.features(image)["pooled"]
    assert first.shape == (1, 16) and first.dtype == np.float32
    same = (image[None], image[None, ..., None], np.repeat(image[None, ..., None], 3, axis=-1))
    for other in same:
        np.testing.assert_allclose(model.features(other)["pooled"], first, atol=1e-5)
    mask = image > 128
    np.testing.assert_array_equal(model.features(mask)["pooled"], model.features(mask * np.uint8(255))["pooled"])
    fixed = TrainedModel(SMALL, model.params, intensity=Intensity("fixed", 1000, 1255))
    counts = image.astype(np.uint16) + 1000
    np.testing.assert_array_equal(fixed.features(counts)["pooled"], model.features(image)["pooled"])


@pytest.mark.parametrize("images, message", [
    (np.zeros((1, 16, 16), np.float32), "images are float32: give uint8, uint16 or bool arrays of shape"),
    (np.zeros((1, 16, 16), np.int64), "images are int64"), (np.zeros((16,), np.uint8), r"shape \(16,\)"),
    (np.zeros((0, 16, 16), np.uint8), r"shape \(0, 16, 16\)"), (np.zeros((1, 16, 16, 2), np.uint8), "shape"),
    (np.zeros((32, 48, 3), np.uint8), r"shape \(32, 48, 3\)"),
])  # fmt: skip
def test_unusable_images_are_one_line(model, images, message):
    with pytest.raises(InputError, match=message) as refused:
        model.features(images)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mae", [False, True], ids=["hybrid", "vit"])
def test_an_encoder_alone_is_loaded_where_no_decoder_is_needed(tmp_path, mae):
    state = random_state(TINY, mae, grid=(4, 6))
    whole = infmae_jax.load(save(tmp_path / "whole.pth", state), **TINY_HEADS)
    path = save(tmp_path / "encoder.pth", encoder_only(state))
    alone = infmae_jax.load(path, **TINY_HEADS)
    assert set(alone.params) == {"encoder"} and alone.image_size == (64, 96)
    jax.tree.map(np.testing.assert_array_equal, alone.params["encoder"], whole.params["encoder"])
    assert load_encoder(str(path), **TINY_HEADS).digest == whole.digest
    convert("torch", "run", path, tmp_path / "run", **TINY_HEADS)
    assert infmae_jax.load(tmp_path / "run").digest == whole.digest
    with pytest.raises(InputError, match="encoder.pth is an encoder alone"):
        alone.reconstruct(np.zeros((16, 16), np.uint8))
    with pytest.raises(InputError, match="lacks decoder_"):
        convert("torch", "safetensors", path, tmp_path / "out.safetensors", **TINY_HEADS)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("key", ["", "state_dict", "model_state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.backbone.", "encoder."])
def test_wrappers_and_prefixes_are_taken_off_and_said(tmp_path, caplog, key, prefix):
    state = random_state(TINY, grid=(2, 2))
    path = save(tmp_path / "c.pth", {prefix + name: array for name, array in state.items()}, key)
    assert infmae_jax.load(path, **TINY_HEADS).config.encoder.widths == (8, 12, 16)
    assert (f"under '{key}'" in caplog.text) is bool(key) and (repr(prefix) in caplog.text) is bool(prefix)


def test_a_head_beside_a_backbone_is_left_out_and_said(tmp_path, caplog):
    state = {f"backbone.{name}": array for name, array in encoder_only(random_state(TINY, grid=(2, 2))).items()}
    path = save(tmp_path / "c.pth", state | {"decode_head.weight": np.zeros((2, 2), np.float32)}, "state_dict")
    assert set(infmae_jax.load(path, **TINY_HEADS).params) == {"encoder"}
    assert "1 tensors beside 'backbone.' are left out: decode_head.weight" in caplog.text


def test_several_models_in_a_file_are_not_guessed(tmp_path):
    tensors = {"a": torch_like.tensor(np.zeros(2, np.float32))}
    torch_like.save(tmp_path / "c.pth", {"state_dict": tensors, "model_ema": dict(tensors)})
    with pytest.raises(InputError, match=r"several models \(state_dict, model_ema\)"):
        infmae_jax.load(tmp_path / "c.pth")


def test_other_objects_beside_the_model_are_ignored(tmp_path):
    tensors = {name: torch_like.tensor(array) for name, array in random_state(TINY, grid=(2, 2)).items()}
    beside = {"mean": np.arange(3.0), "path": pathlib.PosixPath("/a/b"), "seen": {1, 2}, "n": collections.Counter("ab")}
    for protocol in (2, 4):
        torch_like.save(tmp_path / "c.pth", {"model": tensors, **beside}, protocol)
        assert infmae_jax.load(tmp_path / "c.pth", **TINY_HEADS).config.encoder.heads == 4


def test_heads_can_be_given_wherever_a_checkpoint_is_read(tmp_path, shared_folder):
    path = shared_folder / "field_cases" / "checkpoint_heads_flag" / "mae_vit_width_1024like.pth"
    if not path.is_file():
        path = save(tmp_path / "c.pth", random_state({**TINY, "widths": (32,) * 3, "decoder_width": 32}, mae=True))
    done = commands.run("infmae_jax.embed", f"--checkpoint={path}", f"--output={tmp_path}/f.npz", tmp_path)
    assert done.returncode == 2 and "--heads" in done.stderr


def test_a_folder_of_another_program_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTMAEForPreTraining"]}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for read in (infmae_jax.load, lambda path: load_encoder(str(path)), lambda p: load_encoder("random", like=str(p))):
        with pytest.raises(InputError, match="no section 'model'.*model.safetensors"):
            read(tmp_path)


def test_a_run_without_an_encoder_is_named_by_its_task(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "probe", "data_set": {}}))
    for read in (infmae_jax.load, lambda path: load_encoder(str(path)), lambda p: load_encoder("random", like=str(p))):
        with pytest.raises(InputError, match="is a run of the task 'probe': give the run of its encoder"):
            read(tmp_path)


def test_grafting_takes_what_fits_and_accounts_for_it(tmp_path):
    path = save(tmp_path / "c.pth", random_state(TINY, grid=(2, 2)))
    loaded = infmae_jax.load(path, **TINY_HEADS)
    other = loaded.config.replace(decoder_depth=1)
    params = abstract_params(other) | {"head": {"kernel": np.ones((16, 3), np.float32)}}
    out, account = graft(params, loaded, other.encoder)
    jax.tree.map(np.testing.assert_array_equal, out["encoder"], dict(loaded.params["encoder"]))
    assert out["head"] is params["head"] and account == (("encoder",), ("decoder", "head"), ("decoder",))
    assert str(account) == "weights: loaded encoder; new decoder, head; ignored decoder"
    assert set(load_encoder(str(path), **TINY_HEADS).params) == {"encoder"}
    deeper = abstract_params(loaded.config.replace(depths=(2, 1, 4)))
    with pytest.raises(InputError, match=r"does not cover the encoder: 12 of \d+ arrays.*blocks3_3"):
        graft(deeper, loaded)
    with pytest.raises(InputError, match="another encoder.*4 heads, not.*2 heads"):
        graft(params, loaded, other.replace(heads=2).encoder)


def deep_key():
    return b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."


def shared_key():
    return b"\x80\x02})" + b"2\x86" * 120 + b"K\x01s."


def many_copies():
    items = b"]q\x00(" + b"K\x00" * 100_000 + b"e"
    return b"\x80\x02" + items + b"0ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R" * 50_000 + b"."


def copies_of_a_dictionary():
    pairs = b"".join(b"X\x02\x00\x00\x00%c%cN" % (a, b) for a in range(128) for b in range(128))
    return b"\x80\x02}q\x00(" + pairs + b"u0ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R0" * 90_000 + b"."


HOSTILE = {
    "deep tuple as a key": deep_key(),
    "shared tuples as a key": shared_key(),
    "deep key of a storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)" + b"2\x86" * 60
    + b"X\x03\x00\x00\x00cpuK\x01tQ.",
    "sets of everything": b"\x80\x04" + b"\x8f" * 8_000_000 + b".",
    "lists of everything": b"\x80\x04" + b"]" * 16_000_000 + b".",
    "copies of a long list": many_copies(),
    "copies of a long dictionary": copies_of_a_dictionary(),
    "room for bytes that do not follow": b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".",
    "long integers as keys": b"\x80\x02}q\x00" + b"\x8b" + (1 << 23).to_bytes(4, "little") + b"\x7f" * (1 << 23)
    + b"q\x01" + b"0h\x00" + b"h\x01h\x01s" * 100_000 + b".",
    "unknown element type": b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(NK\x00))\x89}ctorch\nfloat8_e4m3fn\ntR.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_soon_in_one_line(tmp_path, name):
    """In a process of its own: what these do to Python's own machine is a crash, or no end."""
    torch_like.save_raw(tmp_path / "c.pth", HOSTILE[name])
    code = (
        "import re, sys, time\nfrom data_pipelines.errors import InputError\n"
        "from infmae_jax.interop import torch_file\nstart = time.monotonic()\n"
        "try: torch_file.read_checkpoint(sys.argv[1])\nexcept InputError as error: print(error)\n"
        # Not ru_maxrss: that of a new process begins at what its parent used.
        "peak = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())\n"
        "print(time.monotonic() - start, int(peak[1]) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c.pth"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    message, took = done.stdout.splitlines()
    seconds, mebibytes = map(float, took.split())
    assert "c.pth cannot be loaded" in message and len(message) < 400
    assert seconds < 5 and mebibytes < 1000, (seconds, mebibytes)


@pytest.mark.parametrize("header", [
    b"{" * 100_000, b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1e9],"data_offsets":[0,4]}}', b'{"a":{"dtype":"F32","shape":[-1]}}', b"[]", b"null",
    b'{"a":{"dtype":"F32","shape":[18446744073709551615,18446744073709551615],"data_offsets":[0,4]}}',
])  # fmt: skip
def test_hostile_safetensors_are_one_line(tmp_path, header):
    (tmp_path / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match="c.safetensors") as refused:
        infmae_jax.load(tmp_path / "c.safetensors")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_header_longer_than_the_file_takes_no_memory(tmp_path):
    (tmp_path / "c.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="c.safetensors"):
        safetensors_file.read_checkpoint(tmp_path / "c.safetensors")


OPCODES = [b"}", b"]", b")", b"(", b"2", b"0", b"1", b"\x85", b"\x86", b"t", b"l", b"d", b"s", b"u", b"a", b"e", b"R",
           b"Q", b"b", b"\x8f", b"\x90", b"\x91", b"K\x01", b"q\x00", b"h\x00", b"\x94", b"X\x01\x00\x00\x00a", b"N",
           b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n",
           b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x07\x00\x00\x00storage"]  # fmt: skip


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(OPCODES), st.integers(1, 3000)), max_size=40))
def test_programs_of_repeated_instructions_are_bounded(tmp_path, program):
    pickled = b"\x80\x04" + b"".join(opcode * times for opcode, times in program) + b"."
    torch_like.save_raw(tmp_path / "c.pth", pickled)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        torch_file.read_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(refused.value)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_field_cases_of_hostile_files(shared_folder):
    folder = shared_folder / "field_cases" / "hostile"
    files = [*(folder / "pth").glob("*.pth"), *(folder / "run_files").glob("*.safetensors")]
    for path in files:
        with pytest.raises(InputError, match=path.name):
            infmae_jax.load(path)
