"""Fine-tuning tasks through the commands and the loop, at the smallest sizes."""

import contextlib
import dataclasses
import json
import os
import runpy
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs.segment import masks_tiny_cpu
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_mask
from data_pipelines.reader import ExampleReader
from data_pipelines.synthetic import write_shards
from infmae_jax.interop.load import load_encoder
from infmae_jax.models.config import variant
from infmae_jax.tasks.batches import PipelineBatches
from infmae_jax.tasks.finetune import resolved
from infmae_jax.tasks.finetune_task import layer_of
from infmae_jax.tasks.finetuned import KINDS, load_finetuned
from infmae_jax.tasks.segment import SegmentLossConfig
from infmae_jax.training import loop, sharding
from infmae_jax.training.config import MeshConfig, from_config
from infmae_jax.training.program import Program
from infmae_jax.training.task import Position
from infmae_jax.training.writers import read_metrics
from tests.commands import run
from tests.tasks.cases import CASES, task_of

CONFIGS = Path(masks_tiny_cpu.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("steps_compiled_once")


@pytest.mark.parametrize("kind", CASES)
def test_the_command_trains_evaluates_and_says_what_it_loaded(runs, kind):
    folder, out = runs(kind)
    assert "weights: loaded encoder; new" in out and "split val" in out
    best = {"segment": "mIoU", "small_target": "IoU"}[kind]
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    rows = [row for row in read_metrics(folder) if f"val_{best.lower()}" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    saved = {row["step"]: row[f"val_{best.lower()}"] for row in rows if row["step"]}
    assert scores[best] == pytest.approx(max(saved.values()), abs=1e-6) and scores["images"] == 6
    assert "stored size" in scores["protocol"] and (folder / "report.html").exists()
    assert Image.open(folder / "evaluation" / "worst.png").width > 100


@pytest.mark.parametrize("kind", CASES)
def test_evaluate_gives_the_run_s_numbers_again(runs, kind, tmp_path):
    folder, _ = runs(kind)
    done = run("infmae_jax.evaluate", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    again, first = (
        json.loads((place / "scores.json").read_text()) for place in (tmp_path / "out", folder / "evaluation")
    )
    assert again == first


def test_evaluate_writes_over_its_own_files_alone(runs, tmp_path):
    folder, _ = runs("segment")
    command = "infmae_jax.evaluate", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}"
    assert run(*command).returncode == 0
    (tmp_path / "out" / "precision.png").write_bytes(b"of a detector")
    (tmp_path / "out" / ".scores.json.partial-1").write_text("cut off")
    assert run(*command).returncode == 0 and not (tmp_path / "out" / "precision.png").exists()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "scores.json").write_text('{"of": "another program"}')
    for where in (tmp_path / "out", tmp_path / "theirs", folder):
        before = sorted(path.name for path in where.iterdir())
        done = run(*command[:2], f"--output={where}")
        assert done.returncode == 2 and f"{where} holds other files than scores: name another" in done.stderr
        assert sorted(path.name for path in where.iterdir()) == before


def test_evaluate_says_where_the_run_s_own_shards_were(runs, tmp_path):
    shutil.copytree(runs("segment")[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["shards"] = ["data/scenes"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = run("infmae_jax.evaluate", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 2 and f"{tmp_path}/run/data/scenes is not there: give --shards=" in done.stderr


@pytest.mark.parametrize("kind", CASES)
def test_the_exported_program_computes_the_same_without_the_project(runs, kind, tmp_path):
    folder, _ = runs(kind)
    out = tmp_path / "model.stablehlo"
    command = "infmae_jax.convert", "--from=run", f"--input={folder}", "--to=jax-export", f"--output={out}"
    done = run(*command, "--image_size=64,96")
    assert done.returncode == 0 and "(1,64,96) uint8" in done.stdout, done.stderr
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96), np.uint8)
    tuned = load_finetuned(folder)
    exported = jax.export.deserialize(bytearray(out.read_bytes()))
    truth = np.asarray(tuned.model.compute(tuned.params, image))
    np.testing.assert_allclose(exported.call(image), truth, atol=1e-6)
    assert str(folder).encode() not in out.read_bytes()
    done = run(*command[:-1], f"--output={tmp_path / 'b'}", "--image_size=64,80")
    assert done.returncode == 2 and "multiples of 32" in done.stderr


def test_class_weights_balance_the_training_pixels(encoder, labelled):
    _, config = task_of("segment", encoder, labelled, loss=SegmentLossConfig(class_weights=("auto",)))
    weights = np.array([float(weight) for weight in config.loss.class_weights])
    reader = ExampleReader([labelled / "surfaces"], "train")
    pixels = sum(np.bincount(decode_mask(reader[i]).ravel(), minlength=256)[: len(weights)] for i in range(len(reader)))
    present = pixels > 0
    assert (weights[present] * pixels[present]).sum() / pixels.sum() == pytest.approx(1, rel=1e-3)
    inverse = pixels.sum() / pixels[present] / present.sum()
    np.testing.assert_allclose(
        weights[present] / weights[present].min(), np.minimum(inverse, 10) / inverse.min(), rtol=2e-3
    )
    for wrong in (("1", "2"), ("nothing",), ("-1",) * len(weights)):
        with pytest.raises(InputError, match="class_weights"):
            task_of("segment", encoder, labelled, loss=SegmentLossConfig(class_weights=wrong))


def test_another_encoder_run_or_a_fine_tuned_one_gives_its_encoder(runs, encoder):
    folder, _ = runs("segment")
    tuned, first = load_encoder(str(folder)), load_encoder(str(encoder))
    assert set(tuned.params) == {"encoder"} and tuned.config.encoder.widths == first.config.encoder.widths
    assert tuned.features(np.zeros((1, 64, 64), np.uint8))["stage3"].shape == (1, 4, 4, 16)


def test_learning_rates_fall_with_depth_as_published(encoder, labelled):
    """The table of MCMAE's transfer: 12 layers, decay 0.75."""
    task, config = task_of("segment", encoder, labelled)
    base = dataclasses.replace(config, encoder=variant("base").encoder)
    task.config = base
    factors = {
        "encoder/patch_embed1/proj/kernel": 0.0317, "encoder/patch_embed4/bias": 0.0317,
        "encoder/blocks1_0/conv1/kernel": 0.0317, "encoder/blocks2_1/mlp/fc1/kernel": 0.0317,
        "encoder/blocks3_0/attn/qkv/kernel": 0.0422, "encoder/blocks3_5/attn/qkv/kernel": 0.178,
        "encoder/blocks3_10/mlp/fc2/kernel": 0.75, "encoder/norm/scale": 1.0, "stride32/conv/kernel": 1.0,
        "head/fuse/conv/kernel": 1.0, "auxiliary/conv1/conv/kernel": 1.0,
    }  # fmt: skip
    for path, factor in factors.items():
        assert task.group(path).learning_rate == pytest.approx(factor, rel=5e-3), path
    task.config = dataclasses.replace(base, freeze="encoder")
    assert task.group("encoder/blocks3_0/attn/qkv/kernel").frozen and not task.group("head/fuse/conv/kernel").frozen
    assert set(task.noise(jax.random.key(0))) == {"dropout"}  # a frozen encoder drops no paths either
    assert layer_of("encoder/blocks_3/mlp/fc1/kernel", dataclasses.replace(base.encoder, kind="vit")) == 4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("s*/[!_]*.py")), ids=lambda path: path.stem)
def test_every_config_fits_its_encoder(path, encoder, labelled, pytestconfig):
    """Traced, not compiled: the full form on the variant that it is for; with --long the smoke form too."""
    module = runpy.run_path(str(path))
    for form in ("smoke", "") if pytestconfig.getoption("--long") else ("",):
        values = module["get_config"](form)
        kind = KINDS[values.task]
        config = from_config(kind.config, values)
        data = dataclasses.replace(config.data, shards=(str(labelled / CASES[values.task][1]),))
        config = dataclasses.replace(config, checkpoint=str(encoder), data=data, variant="")
        config, trained = resolved(config)
        if not form:
            base = variant(values.variant or "tiny").encoder
            widths = {name: getattr(base, name) for name in ("widths", "depths", "heads")}
            config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **widths))
        task = kind.task(config, trained)
        params = jax.eval_shape(task.init, jax.random.key(0))
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in task.batch_spec.items()}
        found = jax.eval_shape(task.loss, params, batch, jax.random.key(0))
        assert found.sum.shape == () and found.sum.dtype == np.float32


def first_losses(task, config, batches, mesh=MeshConfig(data=1), devices=1):
    program = Program.build(task, config, sharding.make_mesh(mesh, jax.devices()[:devices]))
    state, losses = program.start(task.initial(program.state_shapes.params)), []
    for batch in batches:
        state, metrics = program.step(state, program.place(batch))
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state.params)


def test_ignored_pixels_micro_batches_and_devices_change_nothing(encoder, labelled):
    """Every labelled pixel counts the same wherever it lies, however many a micro-batch or device has."""
    _, config = task_of("segment", encoder, labelled)
    quiet = dict(
        encoder=dataclasses.replace(config.encoder, drop_path=0.0),
        head=dataclasses.replace(config.head, dropout=0.0, kind="fcn", fcn_convs=1),
    )
    task, config = task_of("segment", encoder, labelled, **quiet)
    with contextlib.closing(task.train_batches(Position())) as found:
        batches = [next(found) for _ in range(2)]
    for place, batch in enumerate(batches):
        batch["mask"][:, : 8 + 20 * place] = 255
        batch["mask"][0] = 255
    once, params = first_losses(task, config, batches)
    parted = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulate=2))
    spread, others = first_losses(task, parted, batches, MeshConfig(data=4), 4)
    np.testing.assert_allclose(spread, once, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, others)


def test_a_stopped_run_goes_on_bit_for_bit(runs, encoder, labelled, tmp_path, monkeypatch):
    class Stopping(PipelineBatches):
        count = 0

        def __next__(self):
            if self.count == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            self.count += 1
            return super().__next__()

    monkeypatch.setattr("infmae_jax.tasks.finetune_task.PipelineBatches", Stopping)
    stopped = loop.train(*task_of("segment", encoder, labelled), tmp_path)
    assert stopped.interrupted and 2 < stopped.step < 6
    monkeypatch.undo()
    resumed = loop.train(*task_of("segment", encoder, labelled), tmp_path)
    assert resumed.step == 6
    whole = load_finetuned(runs("segment")[0], step=6)
    jax.tree.map(np.testing.assert_array_equal, whole.params, jax.device_get(resumed.state.params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(checkpoint=""), "--checkpoint"),
        (dict(data=dict(val_split="nothing")), "no images in a split 'nothing'"),
        (dict(data=dict(shards=())), "data.shards is empty"),
        (dict(variant="base"), "is not the variant 'base'"),
    ],
)
def test_mistakes_are_one_line(encoder, labelled, changes, message):
    module, mask = CASES["segment"]
    config = from_config(KINDS["segment"].config, module.get_config("smoke"))
    data = dict(shards=(str(labelled / mask),)) | changes.pop("data", {})
    config = dataclasses.replace(
        config, **dict(checkpoint=str(encoder)) | changes, data=dataclasses.replace(config.data, **data)
    )
    with pytest.raises(InputError, match=message) as refused:
        resolved(config)
    assert "\n" not in str(refused.value)


def test_a_bad_checkpoint_is_refused_before_data_are_made(tmp_path):
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "config.json").write_text(json.dumps({"task": "probe", "data_set": {}}))
    workdir = tmp_path / "run"
    done = run(
        "infmae_jax.finetune", f"--config={masks_tiny_cpu.__file__}:smoke", f"--checkpoint={tmp_path / 'probe'}",
        f"--workdir={workdir}", "--config.compilation_cache=",
    )  # fmt: skip
    assert done.returncode == 2 and "give the run of its encoder" in done.stderr and not workdir.exists()


def test_shards_without_masks_or_with_other_classes_are_named(runs, shards, encoder, labelled, tmp_path):
    module, _ = CASES["segment"]
    config = from_config(KINDS["segment"].config, module.get_config("smoke"))
    plain = dataclasses.replace(
        config, checkpoint=str(encoder), data=dataclasses.replace(config.data, shards=(str(shards),))
    )
    with pytest.raises(InputError, match="no labels of the kind 'mask'"):
        resolved(plain)
    folder, _ = runs("segment")
    done = run(
        "infmae_jax.evaluate", f"--checkpoint={folder}", f"--output={tmp_path}", f"--shards={labelled / 'targets'}"
    )
    assert done.returncode == 2 and "classes background, target" in done.stderr
    done = run("infmae_jax.evaluate", f"--checkpoint={folder}", f"--output={tmp_path}", "--split=test")
    assert done.returncode == 2 and "test" in done.stderr
    done = run("infmae_jax.predict", f"--checkpoint={encoder}", f"--output={tmp_path / 'x'}", tmp_path)
    assert done.returncode == 2 and "fine-tuning" in done.stderr


def test_one_class_never_seen_in_val_is_skipped_in_means(runs, tmp_path):
    folder, _ = runs("segment")
    tuned = load_finetuned(folder)
    write_shards(tmp_path / "few", 2, size=(64, 64))
    found = tuned.model.evaluate(tuned.params, [str(tmp_path / "few")], "train")["scores"]
    absent = [row for row in found["classes"] if not row["share"]]
    assert absent and all(row["recall"] is None for row in absent)
    assert json.dumps(found)  # no NaN, no NumPy numbers
