"""The reconstruct command on a small run, and every mistake in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines import masking, transforms
from data_pipelines.errors import InputError
from data_pipelines.intensity import Intensity
from data_pipelines.sheets import GAP
from data_pipelines.synthetic import generate_scene
from infmae_jax.interop.load import load, write
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.models.config import variant
from infmae_jax.models.infmae import InfMAE, abstract_params
from infmae_jax.models.patches import normalize
from infmae_jax.reconstruct import reconstruct
from tests import commands

SMALL = {
    "widths": (8, 12, 16),
    "depths": (1, 1, 1),
    "heads": 2,
    "decoder_width": 16,
    "decoder_heads": 2,
    "decoder_depth": 1,
}
SIZE = (64, 96)


def make_run(folder, mask, **overrides):
    model = variant("tiny", **SMALL, **overrides)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_params(model)
    )
    write(folder, "run", TrainedModel(model, params, mask, SIZE), SIZE, {"made": "by a test"})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", masking.MaskConfig(), norm_pix_loss=True)


@pytest.fixture
def image_files(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        Image.fromarray(generate_scene(0, index, (80, 112)).image).save(path)
    return paths


def command(*arguments):
    return commands.run("infmae_jax.reconstruct", *arguments)


def test_command_writes_a_row_per_image(run, image_files, tmp_path):
    output = tmp_path / "new" / "panel.png"
    done = command(f"--checkpoint={run}", f"--output={output}", "--colormap=gray", *image_files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: 3 images, mean masked loss") and done.stdout.count("\n") == 1
    assert done.stderr == ""
    panel = np.asarray(Image.open(output))
    assert panel.shape[0] > 3 * SIZE[0] and panel.shape[1] > 5 * SIZE[1]
    assert np.array_equal(panel[..., 0], panel[..., 2]) is False  # frames and veil are coloured
    assert [path.name for path in output.parent.iterdir()] == ["panel.png"]


def test_losses_are_the_models_own(run, image_files, tmp_path):
    restored = load(run)
    model = InfMAE(restored.config)
    loss_of = jax.jit(lambda image, ids: model.apply({"params": restored.params}, normalize(image), ids).loss)
    for view in ("crop", "stretch"):
        losses = reconstruct(restored, image_files[:2], tmp_path / "p.png", view=view)
        for path, loss in zip(image_files, losses, strict=False):
            image = transforms.center_crop_resize(np.asarray(Image.open(path)), SIZE, stretch=view == "stretch")[None]
            ids_keep = masking.select_visible(masking.token_scores(image, restored.mask), restored.mask)
            assert loss == pytest.approx(float(loss_of(image[..., None], ids_keep)), rel=1e-5)


def test_random_masks_follow_the_seed_and_original_size_is_kept(image_files, tmp_path):
    mask = masking.MaskConfig(score="none", selection="random")
    trained = load(make_run(tmp_path / "random", mask, kind="vit"))
    output = tmp_path / "p.png"
    again = [reconstruct(trained, image_files, output, image_size=(32, 48), seed=s) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert len(reconstruct(trained, image_files[:2], output, image_size=(80, 112))) == 2
    assert Image.open(output).width == 5 * (2 * 112 + GAP) + GAP


def test_mistakes_are_one_line(run, image_files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    output, image = tmp_path / "out" / "p.png", image_files[0]
    trained = load(run)
    cases = [
        ({"images": []}, "no images"),
        ({"images": [broken]}, "broken.png"),
        ({"images": [tmp_path / "gone.png"]}, "gone.png"),
        ({"images": [image], "image_size": (60, 96)}, "60x96 is not divisible by"),
        ({"images": [image], "output": tmp_path / "p.jpg"}, "p.jpg is not a .png"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            reconstruct(trained, **{"output": output, **arguments})
        assert "\n" not in str(caught.value)
    assert not output.parent.exists()


def test_command_ends_with_one_line_and_code_2(run, image_files, tmp_path):
    output = tmp_path / "p.png"
    for flags, message in (
        ([f"--checkpoint={tmp_path / 'absent'}"], "absent"),
        ([f"--checkpoint={tmp_path}"], "not a run folder"),
        ([f"--checkpoint={run}", "--step=7"], "no checkpoint 7"),
        ([f"--checkpoint={run}", "--image_size=64"], "--image_size=64 is not rows,columns"),
        ([f"--checkpoint={run}", "--image_size=60,60"], "60x60 is not divisible by"),
    ):
        done = command(*flags, f"--output={output}", image_files[0])
        assert done.returncode == 2 and not output.exists() and message in done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_images_are_read_as_the_run_read_them(run, tmp_path):
    """16-bit counts under the run's fixed mapping; another one only where it is asked for, and said."""
    config = json.loads((run / "config.json").read_text())
    config["data"]["intensity"] = {"mapping": "fixed", "low": 29000.0, "high": 31000.0}
    fixed = shutil.copytree(run, tmp_path / "fixed")
    (fixed / "config.json").write_text(json.dumps(config))
    counts = np.random.default_rng(0).integers(29500, 30000, SIZE).astype(np.uint16)
    Image.fromarray(counts).save(tmp_path / "counts.png")
    gray = np.rint((counts - 29000.0) * 255 / 2000).astype(np.uint8)
    expected = load(run).reconstruct(gray).losses
    np.testing.assert_allclose(load(fixed).reconstruct(counts).losses, expected, rtol=1e-6)
    losses = reconstruct(load(fixed), [tmp_path / "counts.png"], tmp_path / "p.png", view="stretch")
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    done = command(
        f"--checkpoint={fixed}", f"--output={tmp_path}/q.png", "--view=stretch", "--intensity=auto",
        tmp_path / "counts.png",
    )  # fmt: skip
    assert done.returncode == 0 and "not by the run's own" in done.stdout
    other = dataclasses.replace(load(fixed), intensity=Intensity("auto")).reconstruct(counts)
    assert not np.array_equal(other.images[0], gray)
