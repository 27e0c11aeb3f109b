"""Weights & Biases, if a run reports to it."""

import contextlib
import os
import sys
import types

import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.training.config import ObserveConfig
from infmae_jax.training.writers import MetricsWriter
from tests.training.test_writers import row, run_child, steps_of, write_rows

WANDB = ObserveConfig(wandb_project="infrared")


def stand_in(**replaced):
    """A module in the place of wandb that remembers calls."""
    calls = []

    class Run:
        def define_metric(self, *args, **kwargs):
            calls.append(("define_metric", args, kwargs))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    class Error(Exception):
        pass

    class CommError(Error):
        pass

    def init(**options):
        calls.append(("init", options))
        return Run()

    module = types.ModuleType("wandb")
    module.__dict__.update(
        init=init, Image=lambda pixels: ("image", pixels.shape), Settings=dict, Error=Error, calls=calls,
        errors=types.SimpleNamespace(CommError=CommError), teardown=lambda: calls.append(("teardown",)),
    )  # fmt: skip
    module.__dict__.update(replaced)
    return module


def test_wandb_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"observe.wandb_project.*infmae-jax\[wandb\]"):
        MetricsWriter(tmp_path, 0, observe=WANDB)


def test_wandb_gets_rows_pictures_and_the_same_run_after_a_restart(tmp_path, monkeypatch):
    wandb = stand_in()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first in (0, 4):
        with contextlib.closing(MetricsWriter(tmp_path, first, observe=WANDB, config={"data.seed": 3})) as writer:
            writer.write(row(first))
            writer.picture("reconstruction", np.zeros((4, 6, 3), np.uint8), first)
    starts = [call[1] for call in wandb.calls if call[0] == "init"]
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"
    assert starts[0]["project"] == "infrared" and starts[0]["config"] == {"data.seed": 3}
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert logged[2] == {"step": 4, "loss": 0.2, "images_per_second": 44.0}
    assert logged[3] == {"step": 4, "reconstruction": ("image", (4, 6, 3))}
    assert wandb.calls[-1] == ("finish",)


def test_wandb_that_refuses_or_breaks(tmp_path, monkeypatch, caplog):
    wandb = stand_in()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def refuse(**options):
        raise wandb.Error("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match="observe.wandb_project=infrared: No API key configured, or set WANDB_MODE"):
        MetricsWriter(tmp_path, 0, observe=WANDB)

    class Broken:
        def log(self, values):
            raise RuntimeError("network down")

        def define_metric(self, *args, **kwargs):
            pass

        finish = log

    def unreachable(**options):
        if options.get("mode") != "offline":
            raise wandb.errors.CommError("timed out")
        broken = Broken()
        broken.finish = lambda: broken.log(None)
        return broken

    monkeypatch.setattr(wandb, "init", unreachable)
    writer = write_rows(tmp_path, range(3), observe=WANDB)
    assert writer.failures == 4 and steps_of(tmp_path) == [0, 1, 2]
    assert len([r for r in caplog.records if "network down" in r.message]) == 1
    assert ("teardown",) in wandb.calls


def test_wandb_itself_offline(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed; the stand-in above is tested instead")
    code = """
        import sys
        from infmae_jax.training.config import ObserveConfig
        from infmae_jax.training.writers import MetricsWriter

        writer = MetricsWriter(sys.argv[1], 0, observe=ObserveConfig(wandb_project="infrared"), config={"a.b": 1})
        writer.write({"step": 0, "loss": 0.5})
        writer.close()
        assert writer.failures == 0
    """
    with run_child(code, tmp_path, env={**os.environ, "WANDB_MODE": "offline"}) as child:
        _, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"infrared" in record.read_bytes()
