"""What is wrong with a checkpoint is found, named and set aside; a run never starts over silently."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import InputError
from infmae_jax.training import storage
from infmae_jax.training.checkpoint import Checkpointer
from tests.training.checkpoint_process import abstract_state, content, start
from tests.training.damage import checkpoints, cut_in_half, flip_a_bit, largest_file


def test_any_damage_to_any_file_is_found_or_does_no_harm(saved, states, mesh, tmp_path):
    """Of the files of the newest checkpoint, one has a bit flipped, the next is cut, emptied, removed, and so on."""
    rng = np.random.default_rng(0)
    harms = {
        "flip": lambda path: flip_a_bit(path, int(rng.integers(1 << 40))),
        "cut": cut_in_half,
        "empty": lambda path: os.truncate(path, 0),
        "remove": Path.unlink,
    }
    abstract, expected = abstract_state(mesh), {step: content(states[step]) for step in (1, 2)}
    files = sorted(p.relative_to(saved) for p in (saved / "checkpoints" / "2").rglob("*") if p.is_file())
    steps = []
    for number, file in enumerate(file for file in files if (saved / file).stat().st_size):
        name = list(harms)[number % len(harms)]
        run = shutil.copytree(saved, tmp_path / "run")
        harms[name](run / file)
        damage = {}
        with Checkpointer(run, on_damage=damage.__setitem__) as checkpointer:
            state, step, metadata = checkpointer.restore(abstract)
        assert content(state) == expected[step] and metadata == {"data_order": step}, (file, name)
        assert (set(damage), checkpoints(run)) == (({2}, ["1"]) if step == 1 else (set(), ["1", "2"])), (file, name)
        assert (run / "damaged" / "2-0").is_dir() == (step == 1)
        steps.append(step)
        shutil.rmtree(run)
    assert set(steps) == {1}  # today every change of every file is found


def test_flipped_array_is_named_and_the_run_goes_on(saved, states, mesh, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    for again in range(2):
        flip_a_bit(largest_file(run / "checkpoints" / "2" / "params"))
        damage = {}
        with Checkpointer(run, on_damage=damage.__setitem__) as checkpointer:
            assert checkpointer.restore(abstract_state(mesh))[1] == 1
            assert "params/" in damage[2] and "differ from what was saved" in damage[2]  # the file is named
            checkpointer.save(states[2], 2)
        assert checkpoints(run) == ["1", "2"]
        assert sorted(path.name for path in (run / "damaged").iterdir()) == [f"2-{n}" for n in range(again + 1)]


def test_damage_is_told_in_one_line(saved, states, tmp_path):
    """Where the reading of many arrays fails at once, each would have its say."""
    run = shutil.copytree(saved, tmp_path / "run")
    for file in (run / "checkpoints" / "2").rglob("d/*"):
        cut_in_half(file)
    output, errors = start(run).communicate(timeout=100)
    assert json.loads(output)["content"] == content(states[1])
    lines = errors.splitlines()
    assert len(lines) == 1 and "checkpoints/2 is damaged: it cannot be read" in lines[0], errors


def test_an_array_that_goes_by_another_name_is_missing(saved, states, mesh, tmp_path):
    """One bit of the list of arrays."""
    run = shutil.copytree(saved, tmp_path / "run")
    listing = run / "checkpoints" / "2" / "params" / "_METADATA"
    assert "kernel" in listing.read_text()
    listing.write_text(listing.read_text().replace("kernel", "kernem"))
    storage.seal(run / "checkpoints" / "2")  # as if it had been saved so
    damage = {}
    with Checkpointer(run, on_damage=damage.__setitem__) as checkpointer:
        assert content(checkpointer.restore(abstract_state(mesh))[0]) == content(states[1])
    assert "kernel is missing" in damage[2] and checkpoints(run) == ["1"]


def test_never_starts_over_silently(saved, mesh, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    flip_a_bit(largest_file(run / "checkpoints" / "1" / "params"))
    cut_in_half(largest_file(run / "checkpoints" / "2" / "params"))
    with Checkpointer(run) as checkpointer:
        with pytest.raises(InputError, match="no checkpoint in .* is whole .2: it cannot be read.*1: par") as caught:
            checkpointer.restore(abstract_state(mesh))
    assert "\n" not in str(caught.value)
    assert checkpoints(run) == ["1", "2"] and not (run / "damaged").exists()


def test_another_model_is_not_taken_for_damage(saved, mesh, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    with Checkpointer(run) as checkpointer, pytest.raises(InputError, match=r"kernel is float32\[64,24\] there, here"):
        checkpointer.restore(abstract_state(mesh, 128))
    assert checkpoints(run) == ["1", "2"] and not (run / "damaged").exists()


@pytest.mark.parametrize("target", ["/dev/zero", "another checkpoint", "pipe"])
@pytest.mark.parametrize("name", ["params/_METADATA", "record.json", "checksums.json", "surplus"])
def test_only_plain_files_inside_a_checkpoint_are_read(saved, states, mesh, tmp_path, name, target):
    run = shutil.copytree(saved, tmp_path / "run")
    path = run / "checkpoints" / "2" / name
    path.unlink(missing_ok=True)
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(run / "checkpoints" / "1" / name if "checkpoint" in target else target)
    damage = {}
    with Checkpointer(run, on_damage=damage.__setitem__) as checkpointer:
        assert content(checkpointer.restore(abstract_state(mesh))[0]) == content(states[1])
    assert f"{name} is a link or a device" in damage[2] and "\n" not in damage[2]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", '{"a": 1}', '{"a": ["x", 1]}', '{"../../x": [NaN, ""]}'])
@pytest.mark.parametrize("name", ["record.json", "checksums.json"])
def test_json_from_strangers_is_damage_in_one_line(saved, states, mesh, tmp_path, name, text):
    run = shutil.copytree(saved, tmp_path / "run")
    (run / "checkpoints" / "2" / name).write_text(text)
    if name == "record.json":
        storage.seal(run / "checkpoints" / "2")
    damage = {}
    with Checkpointer(run, on_damage=damage.__setitem__) as checkpointer:
        assert content(checkpointer.restore(abstract_state(mesh))[0]) == content(states[1])
    assert damage[2] and "\n" not in damage[2]


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES], ids=["too many open files", "no permission"])
def test_what_the_machine_lacks_is_not_taken_for_damage(saved, mesh, tmp_path, monkeypatch, error):
    run = shutil.copytree(saved, tmp_path / "run")

    def refuse(path):
        raise OSError(error, os.strerror(error))

    with Checkpointer(run) as checkpointer:
        monkeypatch.setattr(storage, "_open_file", refuse)
        reason = "cannot be read: (too many files are open|permission is denied); "
        with pytest.raises(InputError, match=reason) as caught:
            checkpointer.restore(abstract_state(mesh))
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        assert checkpointer.restore(abstract_state(mesh))[1] == 2
    assert checkpoints(run) == ["1", "2"] and not (run / "damaged").exists()
