"""Files from strangers, whatever they hold: a value or one line, within seconds and a gigabyte. `--long` tries more.

The control channel between hosts is tried so in tests/training/hosts/test_channel.py.
"""

import bz2
import contextlib
import copy
import gzip
import hashlib
import io
import json
import lzma
import resource
import tarfile
import time
import zipfile
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import infmae_jax
from configs.segment import masks_tiny_cpu
from data_pipelines.builders.coco_file import read_coco
from data_pipelines.errors import InputError
from data_pipelines.prepare.archives import SourceReader, SourceUnreadable
from data_pipelines.prepare.inputs import list_sources
from data_pipelines.remote import local_folders
from data_pipelines.shards import ShardReader
from infmae_jax.interop import load, safetensors_file
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.predict import _begun
from infmae_jax.report import render, summary
from infmae_jax.reporting.history import RunHistory
from infmae_jax.tasks.finetuned import load_finetuned
from tests.data_pipelines.shard_sets import make_set
from tests.data_pipelines.test_coco_files import GOOD, places
from tests.interop import torch_like
from tests.interop.published_format import TINY, random_state

SECONDS, KIBIBYTES = 5, 1 << 20  # of a processor, of memory, for an example
DELETE = object()
# Texts that stand for what `json.dumps` does not write.
RAW = {"@nan": "NaN", "@far": "1e999", "@deep": "[" * 100_000, "@digits": "9" * 5000, "@nul": '"\\u0000\\ud800"'}
HOSTILE = (
    DELETE, None, True, -1, 0, 3, 10**30, -0.5, 1e308, "", "x" * 5000, "../../x", "/dev/zero", "\x1b[31m\n\u202e",
    [], {}, [[]], [None], {"a": {"b": []}}, {"": 1}, *RAW,
)  # fmt: skip


@st.composite
def spoiled(draw, document):
    """The text of a JSON document with some entries deleted or replaced, perhaps cut off."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(document))
        if not spots:
            break
        *path, last = spots[draw(st.integers(0, len(spots) - 1))]
        value, parent = HOSTILE[draw(st.integers(0, len(HOSTILE) - 1))], document
        for key in path:
            parent = parent[key]
        if value is DELETE:
            del parent[last]
        else:
            parent[last] = copy.deepcopy(value)
    text = json.dumps(document)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text[: draw(st.sampled_from([None, None, None, len(text) // 2, 1, 0]))]


@st.composite
def damaged(draw, content):
    """Bytes with some of them changed, cut out, repeated, or replaced by a run of one value."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.sampled_from([1, 2, 4, 8, 64, 4096]))
        piece = bytes(data[at : at + length])
        how = draw(st.sampled_from(["flip", "cut", "repeat", "fill", "end"]))
        changes = {
            "flip": bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in piece[:1]) + piece[1:], "cut": b"",
            "repeat": piece * 3, "fill": bytes([draw(st.sampled_from([0, 0x28, 0x7F, 0x80, 0xFF]))]) * len(piece),
        }  # fmt: skip
        data[at : at + length if how != "end" else len(data)] = changes.get(how, b"")
    return bytes(data)


@contextlib.contextmanager
def bounded(*also):
    """What the block does ends well or in one line (an InputError, or one of `also`), soon and with little memory."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except (InputError, *also) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)[:3000]
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIBIBYTES


@pytest.fixture
def tries(request):
    """Runs a check on examples of a strategy: a few, or many with `--long`."""
    count = 2000 if request.config.getoption("--long") else 40

    def run(strategy, check):
        settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))(given(strategy)(check))()

    return run


def test_what_a_file_says_makes_no_endless_message():
    message = str(InputError(f"duration {'x' * 10**6} is not understood: give a number"))
    assert len(message) < 2000 and message.startswith("duration x") and message.endswith("give a number")


def test_manifests(tmp_path, tries):
    folder = make_set(tmp_path / "set", 4)
    path = tmp_path / "set" / "manifest.json"

    def check(text):
        path.write_text(text)
        with bounded():
            len(ShardReader(local_folders([folder])))

    tries(spoiled(json.loads(path.read_text())), check)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory):
    """Folder and config of a small run."""
    trained = load.untrained(InfMAEConfig().replace(widths=(8, 8, 16), depths=(1, 1, 1), heads=2, decoder_heads=2))
    folder = tmp_path_factory.mktemp("encoder") / "run"
    load.write(folder, "run", trained, (32, 32), {})
    infmae_jax.load(folder)  # the first time takes longer
    return folder, json.loads((folder / "config.json").read_text())


def test_configs_of_runs(encoder_run, tries):
    folder, config = encoder_run

    def check(text):
        (folder / "config.json").write_text(text)
        with bounded():
            infmae_jax.load(folder)

    tries(spoiled(config), check)


@pytest.mark.parametrize("section, change", [
    ("data", None), ("data", {"image_size": 3}), ("data", {"mask": []}), ("model", []), ("task", []),
    ("model", {"encoder": {"depths": [1000, 1, 1]}}), ("model", {"encoder": {"widths": [10**30, 8, 8], "heads": 1}}),
    ("model", {"encoder": {"position_grid": [10**9, 10**9]}}),
])  # fmt: skip
def test_sections_that_are_none_and_models_without_end(encoder_run, section, change):
    folder, config = encoder_run
    (folder / "config.json").write_text(json.dumps({**config, section: change}))
    with bounded(), pytest.raises(InputError, match=str(folder) if section == "data" else None):
        (load_finetuned if section == "task" else infmae_jax.load)(folder)


def test_configs_of_fine_tuned_runs(tmp_path, tries):
    (tmp_path / "checkpoints").mkdir()
    config = json.loads(masks_tiny_cpu.get_config("smoke").to_json_best_effort())

    def check(text):
        (tmp_path / "config.json").write_text(text)
        with bounded():
            load_finetuned(tmp_path)

    tries(spoiled(config), check)


def test_metrics_and_events(tmp_path, tries):
    row = {"step": 3, "time": 1.7e9, "loss": 0.5, "images_per_second": 3.0}
    event = {"time": 1.7e9, "step": 3, "event": "skip", "records": ["a"], "total_steps": 9, "shares": {"data": 0.1}}

    def check(text):
        for name in ("metrics.jsonl", "events.jsonl"):
            (tmp_path / name).write_text(f"{json.dumps(row)}\n{text}\n{json.dumps(event)}\n")
        with bounded():
            history = RunHistory(tmp_path)
            assert summary(history).replace("\n", "").isprintable() and render(history)

    tries(spoiled(row) | spoiled(event), check)


def test_annotations(tmp_path, tries):
    def check(text):
        (tmp_path / "train.json").write_text(text)
        with bounded():
            read_coco(tmp_path / "train.json", tmp_path)

    tries(spoiled(GOOD), check)


def test_predictions_of_before(tmp_path, tries):
    tuned = SimpleNamespace(model=SimpleNamespace(config="", classes=()), params={}, step=0)
    image = tmp_path.parent / "a.png"
    image.write_bytes(b"an image")
    _begun(tmp_path, tuned, {"a": image})
    good = (tmp_path / "settings.json").read_text()
    row = {
        "image": "a",
        "sha256": hashlib.sha256(b"an image").hexdigest(),
        "height": 3,
        "width": 4,
        "class_map": "classes/a.png",
        "shares": {"sky": 1.0},
    }

    def check(texts):
        settings, rows = texts
        (tmp_path / "settings.json").write_text(settings)
        (tmp_path / "predictions.jsonl").write_text(f"{rows}\n")
        with bounded():
            _begun(tmp_path, tuned, {"a": image})

    tries(st.tuples(spoiled(json.loads(good)) | st.just(good), spoiled(row)), check)


def archive(kind):
    """A sound archive of two files."""
    files, out = {"a/b.png": b"\x89PNG" * 40, "c.jpg": b"\xff\xd8" * 400}, io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in files.items():
                file.writestr(name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 200}) as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name + "é" * 120)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}[kind]
    return pack(out.getvalue())


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives(tmp_path, tries, kind):
    path = tmp_path / f"set.{kind}"

    def check(data):
        path.write_bytes(data)
        with bounded(), SourceReader() as reader:
            for source in list_sources([path]).sources:
                with contextlib.suppress(SourceUnreadable):
                    reader.read(source, 1 << 20)

    tries(damaged(archive(kind)), check)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints(tmp_path, tries, suffix):
    state = random_state(TINY)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch_like.save(path, {"model": {name: torch_like.tensor(array) for name, array in state.items()}})
    else:
        safetensors_file.write_checkpoint(path, state, {})
    content = path.read_bytes()

    def check(data):
        path.write_bytes(data)
        with bounded():
            infmae_jax.load(path, heads=4, decoder_heads=4)

    # Names, sizes and types are at the beginning and, in a zip file, at the end.
    head = damaged(content[:4000]).map(lambda data: data + content[4000:])
    tail = damaged(content[-4000:]).map(lambda data: content[:-4000] + data)
    tries(head | tail | damaged(content), check)
