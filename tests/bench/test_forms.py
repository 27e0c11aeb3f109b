"""Ways to compute a step are compared only where they compute the same, and operations are told by their part."""

from types import SimpleNamespace

import pytest

from infmae_jax.bench import forms
from infmae_jax.bench.results import text


def test_other_computations_and_forms_that_fail_are_said(smoke, monkeypatch):
    monkeypatch.setattr(forms, "_ANYWHERE", ({"norm_pix_loss": True}, {"attention": "flash"}))
    ours, other, flash = forms.forms(smoke, 4, rounds=1, torch_forms=())["rows"]
    assert ours["name"] == "as configured" and ours["repeatable"] and "note" not in ours
    assert ours["images_per_second"] > 0
    assert other["note"] == "another first loss: not the same computation" and "images_per_second" not in other
    assert flash["note"].startswith("failed: ") and "flash" in flash["note"] and "images_per_second" not in flash


def test_pytorch_is_named_with_its_version(smoke, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; it is needed only to compare with it")
    monkeypatch.setattr(forms, "_ANYWHERE", ())
    result = forms.forms(smoke, 2, rounds=1, torch_forms=["eager"])
    ours, theirs = result["rows"]
    assert theirs["name"] == "PyTorch eager" and "note" not in theirs and "(" in theirs["first_is_faster_by"]
    assert f"torch={torch.__version__}" in text(result).splitlines()[0]


def test_profile_names_parts_and_adds_up(smoke):
    result = forms.profile(smoke, 4)
    parts = {row["part"]: row["ms"] for row in result["rows"] if row["name"].startswith("all of ")}
    listed = [row for row in result["rows"] if "times" in row]
    assert {"transformer", "convolution stage 1", "decoder or head"} <= set(parts)
    assert listed and sum(row["ms"] for row in listed) <= 1.0001 * sum(parts.values())
    assert [row["ms"] for row in listed] == sorted((row["ms"] for row in listed), reverse=True)
    assert any(row["of"] and row["part"] in parts for row in listed) and "all of transformer" in text(result)


def test_a_loaded_tpu_compiler_does_not_hide_what_runs_on_the_host():
    """libtpu adds a plane of its own, of no device, to every trace of a process it is loaded in."""
    ran = SimpleNamespace(name="dot.1", duration_ns=7.0, stats=[("hlo_op", "dot.1")])
    host = SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(name="a thread", events=[ran, ran])])
    theirs = SimpleNamespace(name="/device:CUSTOM:Megascale Trace", lines=[])
    assert forms._operation_times(SimpleNamespace(planes=[theirs, host])) == {"dot.1": (2, 14.0)}
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[SimpleNamespace(name="Stream #1", events=[ran])])
    assert forms._operation_times(SimpleNamespace(planes=[theirs, gpu, host])) == {"dot.1": (1, 7.0)}
