"""Where commands write: never half, never unsaid, never to a folder named after a URL, and nothing of who ran them."""

import contextlib
import io
import json
import os
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from configs.pretrain import demo
from configs.segment import masks_tiny_cpu
from data_pipelines.errors import InputError
from data_pipelines.files import output_file, writing
from data_pipelines.synthetic import write_dataset, write_shards
from infmae_jax import compile_ahead
from infmae_jax.ahead import targets
from infmae_jax.bench.every import run_all
from infmae_jax.bench.results import report
from infmae_jax.interop import load
from infmae_jax.models.config import InfMAEConfig
from tests.commands import run

READ_ONLY = Path("/sys")  # for root too
TINY = dict(widths=(16, 16, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
SMALLEST = "--config.model.encoder.kind=vit", "--config.model.encoder.depths=(1,1,1)"
SECRETS = ("secretive", "node-17.cluster")  # the user, the host


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A place of somebody whose name nobody should learn, with images, labels and the runs made of them."""
    home = tmp_path_factory.mktemp("home") / SECRETS[0]
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("USER", SECRETS[0])
        patch.setattr(socket, "gethostname", lambda: SECRETS[1])
        place = tmp_path_factory.mktemp(SECRETS[0])
        write_dataset(place / "scenes", 24, size=(80, 104))
        write_shards(place / "labelled", 24, size=(80, 104))
        trained = load.untrained(InfMAEConfig().replace(**TINY), (64, 64))
        load.write(place / "encoder", "run", trained, (64, 64), {})
        for command in (
            ("data_pipelines.prepare.__main__", f"--input={place}/scenes/images", f"--output={place}/shards"),
            ("infmae_jax.pretrain", f"--config={demo.__file__}:smoke", f"--workdir={place}/pretrained",
             f"--config.data.shards={place}/shards", "--config.embedded.probe_images=0", *SMALLEST),
            ("infmae_jax.finetune", f"--config={masks_tiny_cpu.__file__}:smoke", f"--checkpoint={place}/encoder",
             f"--workdir={place}/tuned", f"--config.data.shards={place}/labelled"),
        ):  # fmt: skip
            done = run(*command)
            assert done.returncode == 0, done.stderr
        yield place


def commands(place, out):
    """Every command, its output below the folder `out`: name -> module and arguments."""
    images, run_folder, tuned = f"{place}/scenes/images/train", f"{place}/pretrained", f"{place}/tuned"
    table, smoke = f"{place}/scenes/class_labels.csv", f"{masks_tiny_cpu.__file__}:smoke"
    probe = [f"--config.{key}" for key in (f"csv={table}", "image_size=32x32", "heads=1", "duration=2 steps")]
    return {
        "prepare": ("data_pipelines.prepare.__main__", f"--input={images}", f"--output={out}/shards", "--workers=0"),
        "table": ("data_pipelines.prepare.__main__", f"--table={table}", "--label=label", f"--output={out}/labelled"),
        "build": ("data_pipelines.builders.__main__", "--dataset=small_targets", f"--input={place}/scenes",
                  f"--data_dir={out}/sets"),
        "synthetic": ("data_pipelines.synthetic.__main__", f"--output={out}/scenes", "--count=8", "--height=64",
                      "--width=64"),
        "synthetic shards": ("data_pipelines.synthetic.__main__", f"--output={out}/target_shards", "--count=8",
                             "--height=64", "--width=64", "--shards=targets"),
        "inspect": ("data_pipelines.inspect", f"{place}/shards", f"--output={out}/samples.png", "--image_size=64"),
        "pretrain": ("infmae_jax.pretrain", f"--config={demo.__file__}:smoke", f"--workdir={out}/run",
                     f"--config.data.shards={place}/shards", "--config.embedded.probe_images=0", *SMALLEST),
        "finetune": ("infmae_jax.finetune", f"--config={smoke}", f"--checkpoint={place}/encoder",
                     f"--workdir={out}/tuned", f"--config.data.shards={place}/labelled"),
        "linear_probe": ("infmae_jax.linear_probe", "--checkpoint", run_folder, f"--workdir={out}/probe", *probe),
        "evaluate": ("infmae_jax.evaluate", f"--checkpoint={tuned}", f"--output={out}/scores"),
        "predict": ("infmae_jax.predict", f"--checkpoint={tuned}", f"--output={out}/predictions", images),
        "embed": ("infmae_jax.embed", f"--checkpoint={tuned}", f"--output={out}/features.npz", images),
        "reconstruct": ("infmae_jax.reconstruct", f"--checkpoint={run_folder}", f"--output={out}/panel.png",
                        f"{images}/000000.png"),
        "convert to a run": ("infmae_jax.convert", "--from=run", f"--input={run_folder}", f"--output={out}/converted"),
        "convert": ("infmae_jax.convert", "--from=run", f"--input={run_folder}", "--to=safetensors",
                    f"--output={out}/model.safetensors"),
        "export": ("infmae_jax.convert", "--from=run", f"--input={run_folder}", "--to=jax-export",
                   f"--output={out}/features.stablehlo"),
        "export a head": ("infmae_jax.convert", "--from=run", f"--input={tuned}", "--to=jax-export",
                          f"--output={out}/tuned.stablehlo"),
        "report": ("infmae_jax.report", run_folder, f"--output={out}/page.html"),
        "compile_ahead": ("infmae_jax.compile_ahead", f"--output={out}/account.json"),
        "bench": ("infmae_jax.bench.__main__", "all", f"--output={out}/bench"),
    }  # fmt: skip


NAMES = list(commands("", ""))


@contextlib.contextmanager
def full_disk(size=0):
    """No file can grow beyond so many bytes: the kernel refuses writes as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # others read what would be cut off there
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def refused(done, *texts):
    """Ended with code 2 and one line that says all of `texts`."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(text in errors[0] for text in texts), errors
    return errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_read_only_folders_and_urls_are_refused_before_any_work(made, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "restore_params", lambda *_: pytest.fail("work has begun"))
    refused(run(*commands(made, READ_ONLY)[name]), str(READ_ONLY))
    (tmp_path / "file").write_text("")
    refused(run(*commands(made, tmp_path / "file")[name]), str(tmp_path / "file"))
    refused(run(*commands(made, "gs://bucket")[name]), "gs:// is not supported here, name a local path")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("compile_ahead", "bench")])
def test_a_full_disk_is_one_line(made, name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with full_disk():
        refused(run(*commands(made, out)[name]), str(out))
    left = [path for path in out.rglob("*") if path.is_file() and path.stat().st_size]
    # Orbax's threads may write a moment longer, once there is room again: into what nobody takes for a result.
    assert not [path for path in left if ".partial-" not in str(path.relative_to(out))], left


def test_a_disk_that_fills_up_in_the_middle_is_one_line(made, tmp_path):
    for name in ("convert to a run", "convert", "evaluate"):
        with full_disk(2500):
            refused(run(*commands(made, tmp_path)[name]), str(tmp_path))
    assert not list(tmp_path.glob("*model.safetensors*")) and not list(tmp_path.glob("*converted*"))


def test_a_full_disk_ends_accounts_and_benchmarks_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "target", lambda _: SimpleNamespace(devices=lambda _: []))
    monkeypatch.setattr(compile_ahead, "compile_ahead", lambda *_: {"fits": True})
    with full_disk():
        refused(run(*commands("", tmp_path)["compile_ahead"]), "account.json")
    with full_disk(), contextlib.redirect_stderr(io.StringIO()), pytest.raises(InputError, match="cannot be written"):
        run_all({"flops": lambda: report("flops", {}, [{"name": "a"}])}, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_to_write_are_looked_at_first(tmp_path):
    assert output_file(tmp_path / "new" / "deep" / "file", "output") == tmp_path / "new" / "deep" / "file"
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is a folder: name a file"):
        output_file(tmp_path, "output")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file: name a folder"):
        output_file(tmp_path / "file" / "scores.json", "output")
    with pytest.raises(InputError, match="a file is in the way, choose another"), writing(tmp_path / "file"):
        (tmp_path / "file" / "x").mkdir()


def test_nothing_that_is_written_names_a_folder_a_user_or_a_host(made, tmp_path):
    """Of a short pretraining and fine-tuning run, and of everything that is made from them."""
    out = made / "products"
    out.mkdir()
    for name, command in commands(made, out).items():
        if name not in ("pretrain", "finetune", "compile_ahead", "bench"):  # the first two are there
            done = run(*command)
            assert done.returncode == 0, (name, done.stderr)
    (out / "features.npz").unlink()  # it names the images as they were given
    files = [path for path in made.rglob("*") if path.is_file()]
    assert {"config.json", "results.json", "scores.txt", "report.html", "page.html"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for secret in (*SECRETS, str(tmp_path.parent)):
            place = content.find(secret.encode())
            assert place < 0, (path, content[max(place - 200, 0) : place + 100])
    assert json.loads((made / "tuned" / "config.json").read_text())["checkpoint"] == "../encoder"
