"""Detection through the commands and the loop, at the smallest sizes."""

import contextlib
import csv
import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from pycocotools.coco import COCO

from configs.detect import boxes_tiny_cpu, m3fd_cascade, m3fd_mask_rcnn
from data_pipelines.errors import InputError
from data_pipelines.examples import Objects
from data_pipelines.reader import ExampleReader
from data_pipelines.shards import read_manifest
from infmae_jax.interop.load import load_encoder
from infmae_jax.models.config import variant
from infmae_jax.tasks.batches import PipelineBatches
from infmae_jax.tasks.detect import DetectConfig, DetectTask
from infmae_jax.tasks.finetune import resolved, without_data
from infmae_jax.tasks.finetuned import KINDS, load_finetuned
from infmae_jax.training import loop
from infmae_jax.training.config import from_config
from infmae_jax.training.task import Position
from infmae_jax.training.writers import read_metrics
from tests.commands import run
from tests.data_pipelines.shard_sets import make_example, make_image, write_splits


def smoke(encoder, shards, module=boxes_tiny_cpu, arg="smoke", **changes):
    """A config before `resolved`."""
    config = from_config(DetectConfig, module.get_config(arg))
    data = dataclasses.replace(config.data, shards=(str(shards),), **changes.pop("data", {}))
    return dataclasses.replace(config, checkpoint=str(encoder), data=data, **changes)


def task_of(*args, **changes):
    config, trained = resolved(smoke(*args, **changes))
    return DetectTask(config, trained), config


@pytest.fixture(scope="module")
def scenes(labelled):
    return labelled / "surfaces"


@pytest.fixture(scope="module")
def trained_run(encoder, scenes, tmp_path_factory, steps_compiled_once):
    """Run folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("detect") / "run"
    done = run(
        "infmae_jax.finetune", f"--config={boxes_tiny_cpu.__file__}:smoke", f"--checkpoint={encoder}",
        f"--workdir={folder}", f"--config.data.shards={scenes}", "--config.compilation_cache=",
        "--config.head.score_threshold=0.01", "--config.threshold=0.05",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_command_trains_evaluates_and_says_what_it_concluded(trained_run, scenes, tmp_path):
    folder, out = trained_run
    most = max(len(e.objects.boxes) for e in map(ExampleReader([scenes]).__getitem__, range(18)))
    assert f"18 training images (" in out and f"at most {most} boxes each" in out  # noqa: F541
    assert "anchors of " in out and "masks: no mask branch" in out and "split val" in out
    rows = [row for row in read_metrics(folder) if "val_ap" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    logged = [row for row in read_metrics(folder) if "rpn_class" in row]
    for row in logged:
        parts = [row[name] for name in ("rpn_class", "rpn_box", "box_class", "box_box")]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    saved = [row["val_ap"] for row in rows if row["step"]]
    assert scores["AP"] == pytest.approx(max(saved), abs=1e-6) and scores["images"] == 6
    assert "COCO's definition" in scores["protocol"] and (folder / "report.html").exists()
    for name in ("worst", "best", "precision"):
        assert Image.open(folder / "evaluation" / f"{name}.png").width > 300
    results = json.loads((folder / "evaluation" / "detections.json").read_text())
    assert {row["image_id"] for row in results} <= set(range(1, 7)) and results
    done = run("infmae_jax.evaluate", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0 and json.loads((tmp_path / "out" / "scores.json").read_text()) == scores


def predicted(folder):
    rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return {row["image"]: row for row in rows}


def test_predictions_are_in_the_source_s_ids_and_pixels(trained_run, tmp_path):
    folder, _ = trained_run
    rng, source = np.random.default_rng(0), tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    sizes = {"=a": (70, 100), "deep/b": (90, 104), "tiny": (12, 9)}  # two on the canvas of the training images
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(source / f"{name}.png")
    command = "infmae_jax.predict", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}", source
    done = run(*command)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    rows = predicted(out)
    results = json.loads((out / "detections.json").read_text())
    classes = load_finetuned(folder).model.classes
    assert set(rows) == set(sizes)
    for name, row in rows.items():
        height, width = sizes[name]
        assert (row["height"], row["width"], row["file"]) == (height, width, f"{name}.png")
        assert (out / row["overlay"]).is_file()
        boxes = np.array([entry["box"] for entry in row["objects"]]).reshape(-1, 4)
        assert (boxes >= 0).all() and (boxes[:, 2:] <= [width, height]).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        scores = [entry["score"] for entry in row["objects"]]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 100
        assert all(entry["category_id"] == classes.index(entry["class"]) + 1 for entry in row["objects"])
        ours = [entry for entry in results if entry["file_name"] == row["file"]]
        assert [entry["score"] for entry in ours] == scores
        np.testing.assert_allclose([e["bbox"][2] for e in ours], boxes[:, 2] - boxes[:, 0], atol=0.011)
    known = COCO()
    categories = [{"id": n} for n in range(1, len(classes) + 1)]
    known.dataset = {"images": [{"id": n} for n in (1, 2, 3)], "categories": categories}
    known.createIndex()
    assert len(known.loadRes(results).getAnnIds()) == len(results) > 0
    with open(out / "detections.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(results) and {row["file"][0] for row in table} <= set("'dt")
    assert run(*command).returncode == 0  # all is there
    done = run(*command, "--tile=64", "--overlap=32")
    assert done.returncode == 2 and "another model" in done.stderr
    done = run(*command[:2], f"--output={tmp_path / 'tiles'}", source, "--tile=64", "--overlap=32")
    assert done.returncode == 0, done.stderr
    assert predicted(tmp_path / "tiles")["tiny"]["objects"] == rows["tiny"]["objects"]  # no larger than a tile
    done = run(*command[:2], f"--output={tmp_path / 'no'}", source, "--tile=60")
    assert done.returncode == 2 and "--tile=60,60: give rows,columns, multiples of 32" in done.stderr


def test_the_exported_program_finds_the_same(trained_run, tmp_path):
    folder, _ = trained_run
    out = tmp_path / "model.stablehlo"
    done = run(
        "infmae_jax.convert", "--from=run", f"--input={folder}", "--to=jax-export", f"--output={out}",
        "--image_size=64,96",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96), np.uint8)
    tuned = load_finetuned(folder)
    found = jax.export.deserialize(bytearray(out.read_bytes())).call(image)
    for name, wanted in tuned.model.compute(tuned.params, image).items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-4)


def test_devices_and_orders_change_nothing(trained_run, encoder, scenes):
    task, _ = task_of(encoder, scenes)
    with contextlib.closing(task.train_batches(Position())) as batches:
        batch = next(batches)
    params = load_finetuned(trained_run[0]).params
    loss = jax.jit(lambda params, batch: task.loss(params, batch, jax.random.key(1)))
    found = []

    def on(devices, batch):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        put = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        return loss(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), put)

    for devices in (1, 4):
        value = on(devices, batch)
        found.append(float(value.sum) / float(value.weight))
        assert float(value.weight) == 8
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    # images of a batch and boxes of an image in another order
    order = np.random.default_rng(0).permutation(8)
    moved = {name: of[order] for name, of in batch.items()}
    counts = moved["box_valid"].sum(axis=1)
    for name in ("boxes", "classes", "crowd"):
        for row, count in enumerate(counts):
            moved[name][row, :count] = moved[name][row, :count][::-1]
    value = on(1, moved)
    assert float(value.sum) / 8 == pytest.approx(found[0], rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(trained_run, encoder, scenes, tmp_path, monkeypatch, pytestconfig):
    if not pytestconfig.getoption("--long"):
        pytest.skip("segmentation stands for all tasks: --long")

    class Stopping(PipelineBatches):
        count = 0

        def __next__(self):
            if self.count == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            self.count += 1
            return super().__next__()

    same = smoke(encoder, scenes, threshold=0.05)
    same = dataclasses.replace(same, head=dataclasses.replace(same.head, score_threshold=0.01))

    def task():
        config, trained = resolved(same)
        return DetectTask(config, trained), config

    monkeypatch.setattr("infmae_jax.tasks.finetune_task.PipelineBatches", Stopping)
    stopped = loop.train(*task(), tmp_path)
    assert stopped.interrupted and 2 < stopped.step < 6
    monkeypatch.undo()
    resumed = loop.train(*task(), tmp_path)
    assert resumed.step == 6
    whole = load_finetuned(trained_run[0], step=6)
    jax.tree.map(np.testing.assert_array_equal, whole.params, jax.device_get(resumed.state.params))


@pytest.mark.parametrize("module", [m3fd_cascade, m3fd_mask_rcnn])
def test_every_config_fits_its_encoder(module, encoder, scenes):
    """Traced, not compiled, as the variant that it is for."""
    config, trained = resolved(smoke(encoder, scenes, module, "", variant=""))
    base = variant(module.get_config("").variant or "tiny").encoder
    widths = {name: getattr(base, name) for name in ("widths", "depths", "heads")}
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **widths))
    task = DetectTask(config, trained)
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in task.batch_spec.items()}
    found = jax.eval_shape(task.loss, params, batch, jax.random.key(0))
    assert found.sum.shape == () and found.sum.dtype == np.float32


def with_objects(folder, rows, classes=("car", "bus")):
    """A shard set of images of 60x80 with (boxes, classes, texts of outlines) each, the same in train and val."""

    def example(number, row):
        boxes, numbers, texts = row
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
        objects = Objects(boxes, np.array(numbers, np.int32), np.zeros(len(boxes), bool), area, tuple(texts))
        return dataclasses.replace(make_example(f"train/image{number}", make_image(number), "png"), objects=objects)

    examples = [example(n, row) for n, row in enumerate(rows)]
    path = Path(write_splits(folder, {"train": examples, "val": examples}, shards=1))
    content = json.loads((path / "manifest.json").read_text())
    content["classes"] = {"objects": list(classes)}
    content["settings"] = {"category_ids": {"car": 7, "bus": 3}}
    (path / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(path).classes
    return path


TRIANGLE = "[[1, 1, 20, 1, 20, 20]]"
BOX = "[[1, 1, 20, 1, 20, 20, 1, 20]]"
ONE = [[1, 1, 20, 20]]


def test_masks_follow_the_outlines_and_ids_the_source(encoder, tmp_path, capsys):
    drawn = with_objects(tmp_path / "drawn", [(ONE, [0], [TRIANGLE]), ([], [], [])])
    task, config = task_of(encoder, drawn)
    assert config.masks == "outlines" and config.category_ids == ("7", "3") and config.max_objects == 1
    assert task.batch_spec["outlines"] == ((8, 1, 56, 56), np.uint8) and task.model.category_ids == [7, 3]
    printed = capsys.readouterr().out
    assert "a mask branch; 1 of 1 objects have an outline" in printed and "no training box is of bus" in printed
    boxes = with_objects(tmp_path / "boxes", [(ONE, [1], [BOX]), (ONE, [0], [TRIANGLE]), (ONE, [0], ["[]"])])
    assert task_of(encoder, boxes)[1].masks == "none"
    with_boxes, config = task_of(encoder, boxes, masks="boxes")
    assert config.masks == "boxes" and "outlines" not in with_boxes.batch_spec and with_boxes.model.module.masks
    assert task_of(encoder, drawn, masks="none")[1].masks == "none"
    with pytest.raises(InputError, match="masks=outlines, but no training object has"):
        task_of(encoder, with_objects(tmp_path / "plain", [(ONE, [1], [BOX])]), masks="outlines")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([([], [], [])], {}, "no boxes in the split train"),
        ([(ONE, [0], []), (ONE * 3, [0, 1, 1], [])], dict(max_objects=2), "image1 has 3 objects, more than max"),
    ],
)
def test_mistakes_are_one_line_before_training(encoder, tmp_path, rows, changes, message):
    shards = with_objects(tmp_path / "set", rows)
    with pytest.raises(InputError, match=message) as refused:
        task_of(encoder, shards, **changes)
    assert "\n" not in str(refused.value)


def test_a_missing_library_is_said_before_training(encoder, scenes, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"infmae-jax\[detection\]"):
        task_of(encoder, scenes)


def test_without_data_the_step_can_be_measured_and_compiled_ahead(encoder):
    """As `bench detect` and `compile_ahead` ask for it: traced, on as many objects as a crowded image has."""
    config = without_data(from_config(DetectConfig, boxes_tiny_cpu.get_config("smoke")))
    task = KINDS["detect"].task(config, load_encoder(str(encoder)))
    assert config.masks == "none" and task.batch_spec["boxes"][0] == (config.data.batch_size, 100, 4)
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in task.batch_spec.items()}
    assert jax.eval_shape(task.loss, params, batch, jax.random.key(0)).sum.shape == ()
