"""What the command prints and draws is what the pipeline gives."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.inspect import draw_samples, inspect, training_samples
from data_pipelines.masking import MaskConfig
from data_pipelines.pipeline import PipelineConfig, record_keys
from data_pipelines.synthetic import CATEGORIES, generate_scene, is_val, write_shards
from data_pipelines.transforms import resize
from tests import commands
from tests.data_pipelines.shard_sets import make_set

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("data") / "set", 9)


@pytest.fixture(scope="module")
def config(shards):
    return PipelineConfig((shards,), image_size=(48, 64), batch_size=6, mask=MaskConfig(score="entropy", stride=3))


def test_the_box_drawn_is_the_one_that_was_cut(config):
    samples = training_samples(config)
    assert [sample.example.key for sample in samples] == record_keys(config, 0)
    for sample in samples:
        cut = resize(sample.box.of(sample.stored), (48, 64))
        assert any((sample.crop == view).all() for view in (cut, cut[:, ::-1]))


def test_picture_shows_crop_scores_and_visible_tokens(config):
    samples = training_samples(config)[:2]
    picture = np.asarray(draw_samples(samples, config))
    # The last tile of the first row: kept tokens as they are, the others covered.
    tile = picture[16 : 16 + 48, -(64 + 6) : -6, 0]
    covered = 0
    for token in range(12):
        top, left = token // 4 * 16, token % 4 * 16
        patch, crop = (pixels[top : top + 16, left : left + 16] for pixels in (tile, samples[0].crop))
        if token in samples[0].ids_keep:
            np.testing.assert_array_equal(patch, crop)
        else:
            covered += 1
            assert len(np.unique(patch)) == 1
    assert covered == 8


def test_lines_state_the_manifest_and_the_tokens(config, tmp_path):
    lines = "\n".join(inspect(config, tmp_path / "samples.png", 2, verify=True))
    for stated in ("9 in 2 shards", "4 of 12 kept by entropy, stride", "equal their digests", "mean 0.400, std 0.200"):
        assert stated in lines
    assert Image.open(tmp_path / "samples.png").size[1] > 2 * 48
    assert os.listdir(tmp_path) == ["samples.png"]


@pytest.mark.parametrize("output,samples", [("samples.jpg", 2), ("missing/samples.png", 2), ("samples.png", 0)])
def test_unusable_requests_are_refused(config, tmp_path, output, samples):
    with pytest.raises(InputError):
        inspect(config, tmp_path / output, samples)
    assert os.listdir(tmp_path) == []


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.inspect", *map(str, arguments)],
        check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=120,
    )  # fmt: skip


def test_command_writes_the_picture_and_names_a_missing_set(shards, tmp_path):
    result = _command(shards, f"--output={tmp_path}/x.png", "--samples=2", "--image_size=64", "--score=variance")
    assert result.returncode == 0, result.stderr
    assert "4 of 16 kept by variance, stride" in result.stdout and (tmp_path / "x.png").exists()
    result = commands.run("data_pipelines.inspect", tmp_path / "nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "nowhere" in result.stderr and result.stderr.count("\n") == 1


def test_labels_are_counted_and_coloured(tmp_path):
    manifest = write_shards(tmp_path / "set", 12, seed=1, size=(64, 80), val_fraction=0.5)
    config = PipelineConfig((str(tmp_path / "set"),), image_size=(64, 64), batch_size=4)
    lines = inspect(config, tmp_path / "x.png", 4)
    assert any(line.split() == ["splits", "train", "(6),", "val", "(6)"] for line in lines)
    shown = [line for line in lines if line.strip().startswith("mask:")]
    scenes = [generate_scene(1, index, (64, 80)) for index in range(12) if not is_val(index, 0.5)]
    sky = np.mean([scene.class_mask == 0 for scene in scenes])
    assert len(shown) == 2 and f"sky {sky:.1%}," in shown[0] and f"of {6 * 64 * 80} pixels" in shown[0]
    boxes = [CATEGORIES[number] for scene in scenes for number in scene.objects.classes]
    (line,) = [line for line in lines if line.strip().startswith("objects:") and f"of {len(boxes)} boxes" in line][:1]
    assert f"person {boxes.count('person') / len(boxes):.1%}" in line
    assert sum(f"{name} 16.7%" in "".join(lines) for name in manifest.classes["label"]) == 6
    picture = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    stored = picture[16:, 6:86]
    assert (np.ptp(stored, axis=-1) > 30).mean() > 0.1  # colour over the gray
