"""The embed command: order, resume, broken files, sizes; and `infmae JOB`."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from infmae_jax import __main__ as jobs
from infmae_jax import embed as module
from infmae_jax.embed import embed
from infmae_jax.interop.load import untrained
from infmae_jax.models.config import variant
from tests import commands

SMALL = dict(widths=(8, 12, 16), depths=(1, 1, 1), heads=2)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    return untrained(variant("tiny", **SMALL), (32, 48))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    for name, size in (("b.png", (40, 50)), ("a.png", (15, 15)), ("sub/c.png", (40, 50)), (".hidden/d.png", (40, 50))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, size).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def read(path):
    with np.load(path) as stored:
        return [name.rsplit("/", 1)[-1] for name in stored["names"]], stored["features"]


@pytest.mark.parametrize("feature, width", [("pooled", 16), ("stage1", 8), ("multi", 36)])
def test_features_of_a_folder_in_order(model, folder, tmp_path, feature, width):
    assert embed(model, [folder], tmp_path / "f.npz", feature=feature, view="original") == []
    names, features = read(tmp_path / "f.npz")
    assert names == ["a.png", "b.png", "c.png"] and features.shape == (3, width)
    for name, row in zip(("a.png", "b.png", "sub/c.png"), features, strict=True):
        maps = model.features(np.asarray(Image.open(folder / name)))
        stages = ("stage1", "stage2", "stage3") if feature == "multi" else (feature,)
        expected = np.concatenate([m[0] if m.ndim == 2 else m[0].mean((0, 1)) for m in (maps[s] for s in stages)])
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz", "images"]


def test_parquet_holds_the_same(model, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("f.npz", "f.parquet"):
        embed(model, [folder], tmp_path / name)
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    names, features = read(tmp_path / "f.npz")
    assert [name.rsplit("/", 1)[-1] for name in table["names"]] == names
    np.testing.assert_array_equal(np.array(table["features"], np.float32), features)


def test_a_killed_run_goes_on(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART", 1)
    embed(model, [folder], tmp_path / "whole.npz")
    original, computed = module._part, []

    def killed(trained, files, *rest):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(files[0].name)
        return original(trained, files, *rest)

    monkeypatch.setattr(module, "_part", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(model, [folder], tmp_path / "f.npz")
    assert computed == ["a.png", "b.png"] and not (tmp_path / "f.npz").exists()
    computed.clear()
    embed(model, [folder], tmp_path / "f.npz")
    assert computed == ["c.png"]
    np.testing.assert_array_equal(read(tmp_path / "f.npz")[1], read(tmp_path / "whole.npz")[1])


def test_a_broken_file_is_named_and_the_rest_done(folder, tmp_path):
    (folder / "b.png").write_bytes(b"\x89PNG broken")
    arguments = ("--checkpoint=random", f"--output={tmp_path}/f.npz", "--image_size=32,32", folder)
    done = commands.run("infmae_jax.embed", *arguments)
    assert done.returncode == 4 and "b.png" in done.stderr and "1 images left out" in done.stdout
    assert read(tmp_path / "f.npz")[0] == ["a.png", "c.png"]


@pytest.mark.parametrize("arguments, message", [
    (["EMPTY"], "no images in"), ([], "no images: name image"), (["gone.png"], "none of the 1 images can be read"),
    (["EMPTY", "--output=x.csv"], "neither .npz nor .parquet"), (["EMPTY", "--low=3"], "--low and --high belong"),
    (["EMPTY", "--image_size=15,32"], "multiples of 16"),
    (["EMPTY", "--image_size=64,64", "--view=original"], "--image_size has no meaning with --view=original"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [argument.replace("EMPTY", str(tmp_path / "empty")) for argument in arguments]
    done = commands.run("infmae_jax.embed", "--checkpoint=random", f"--output={tmp_path}/f.npz", *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "f.npz").exists()


def test_an_output_that_cannot_be_written_is_one_line(model, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file: name a folder"):
        embed(model, [folder], tmp_path / "file" / "f.npz")


def test_jobs_are_listed_without_jax_and_mistakes_named():
    code = (
        "import sys; from infmae_jax.__main__ import main\n"
        "try: main(['infmae'])\nexcept SystemExit as done: print(done.code, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert all(f"  {job} " in done.stderr for job in jobs.JOBS)


@pytest.mark.parametrize("job, message", [("pretrian", "did you mean pretrain?"), ("xyz", "the jobs are prepare")])
def test_a_mistyped_job(capsys, job, message):
    with pytest.raises(SystemExit) as done:
        jobs.main(["infmae", job])
    assert done.value.code == 2 and message in capsys.readouterr().err


def test_ctrl_c_while_a_job_is_imported(capsys, monkeypatch):
    def import_(*module, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.runpy, "run_module", import_)
    monkeypatch.setattr(jobs.sys, "argv", ["infmae"])
    with pytest.raises(SystemExit) as done:
        jobs.main(["infmae", "predict"])
    assert done.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("job", jobs.JOBS)
def test_every_job_is_a_module_with_a_command_line(job):
    spec = importlib.util.find_spec(jobs.JOBS[job][0])
    assert spec is not None
    assert not spec.submodule_search_locations or importlib.util.find_spec(f"{spec.name}.__main__") is not None
