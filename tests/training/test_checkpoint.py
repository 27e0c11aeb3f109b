"""Checkpoints are whole or ignored, whatever happens to the process, the disk or the files."""

import json
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from infmae_jax.training.checkpoint import Checkpointer, NonFiniteState, SaveFailed
from infmae_jax.training.storage import best_checkpoint
from tests.training.checkpoint_process import abstract_state, content, make_mesh, make_state, start
from tests.training.damage import checkpoints, cut_in_half, flip_a_bit, largest_file

WIDE = 4096  # kernels of 400 kB


def two_processes(*runs, **options):
    """The JSON lines that each of two processes prints, as parsed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(*runs, processes=2, port=port, index=index, **options) for index in (0, 1)]
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        found.append([json.loads(line) for line in output.splitlines() if line.startswith("{")])
    return found


# ---- Save and restore -----------------------------------------------------------------------------------------------


def test_state_comes_back_on_fewer_devices(saved, states):
    for count in (4, 2, 1):
        with Checkpointer(saved) as checkpointer:
            state, step, metadata = checkpointer.restore(abstract_state(make_mesh(count)))
        assert (step, int(state.step), metadata) == (2, 2, {"data_order": 2})
        assert content(state) == content(states[2])
        assert len(state.params["encoder"]["kernel"].sharding.device_set) == count


def test_new_run_has_nothing_to_restore(mesh, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract_state(mesh)) is None
        assert checkpointer.latest_step() is None and best_checkpoint(tmp_path, "loss", "min") is None
    assert not list(tmp_path.iterdir())


def test_arrays_may_be_reused_at_once(mesh, tmp_path):
    """Donated buffers are overwritten while the checkpoint is being written."""
    state = make_state(mesh, 5, WIDE)
    expected = content(state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer, jax.transfer_guard("disallow"):
        checkpointer.save(state, 5)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        with jax.transfer_guard("allow"):
            restored, _, _ = checkpointer.restore(abstract_state(mesh, WIDE))
    assert content(restored) == expected


def test_checkpoint_that_is_there_is_not_saved_again(saved, states, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    with Checkpointer(run) as checkpointer:
        checkpointer.save(states[3], 2, {}, {"data_order": 9})
        checkpointer.wait()
        assert checkpointer.restore(abstract_state(make_mesh(1)))[2] == {"data_order": 2}


def test_latest_best_and_every_kth_are_kept_across_restarts(states, tmp_path):
    losses = {10: 0.9, 20: 0.3, 30: 0.5, 40: 0.8, 50: 0.4, 60: 0.7}
    for step, loss in losses.items():
        with Checkpointer(tmp_path, keep=2, keep_best=2, keep_every=30) as checkpointer:  # a process each
            checkpointer.save(states[1], step, {"loss": loss})
    assert checkpoints(tmp_path) == ["20", "30", "50", "60"]
    with Checkpointer(tmp_path, keep=1, keep_best=1) as checkpointer:
        assert (checkpointer.latest_step(), best_checkpoint(tmp_path, "loss", "min")) == (60, 20)
        checkpointer.save(states[1], 70)  # of unknown loss
    assert checkpoints(tmp_path) == ["20", "70"]


def test_best_is_what_the_named_metric_says(states, tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: float("nan")}
    for step, score in scores.items():
        with Checkpointer(tmp_path, keep=1, keep_best=1, best=("top1", "max")) as checkpointer:
            checkpointer.save(states[1], step, {"loss": score, "top1": score})
    assert best_checkpoint(tmp_path, "top1", "max") == 2 and checkpoints(tmp_path) == ["2", "4"]
    assert best_checkpoint(tmp_path, "miou", "max") is None
    with pytest.raises(ValueError, match="neither 'min' nor 'max'"):
        Checkpointer(tmp_path, best=("loss", "most"))


def test_a_save_compiles_nothing(mesh, tmp_path):
    """Shapes that no other test has, so that no program for them is at hand."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
    state = make_state(mesh, 1, 136)
    made = [event for event in compiled if "backend_compile" in event]
    assert made, "the listener sees nothing"
    compiled.clear()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, 1)
    assert not [event for event in compiled if "compile" in event or "trace" in event]
    assert checkpoints(tmp_path) == ["1"]


@pytest.mark.parametrize("leaf", ["params", "opt_state"])
def test_state_that_is_not_finite_is_refused(states, tmp_path, leaf):
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan) if x.ndim == 2 else x, getattr(states[1], leaf))
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(NonFiniteState, match="kernel is not finite before step 4") as caught:
            checkpointer.save(states[1].replace(**{leaf: bad}), 4)
        assert caught.value.exit_code == 3 and checkpointer.latest_step() is None
        checkpointer.save(states[1], 5)
    assert checkpoints(tmp_path) == ["5"]


# ---- Several processes ----------------------------------------------------------------------------------------------


def test_other_processes_and_devices_see_the_same(saved, states, tmp_path):
    """Two processes of 4 devices save, and restore that, what one process with 2 devices saved, and damaged copies."""
    runs = [saved, tmp_path / "eight"]
    runs[1].mkdir()
    for harm in (flip_a_bit, cut_in_half, Path.unlink):
        runs.append(shutil.copytree(saved, tmp_path / harm.__name__))
        harm(largest_file(runs[-1] / "checkpoints" / "2" / "params"))

    results = two_processes(*runs, save=runs[1], devices=4)
    assert results[0] == results[1]  # damage, even in a part that one process alone reads, is seen by both alike
    assert [found["step"] for found in results[0]] == [2, 2, 1, 1, 1]
    for run, found in zip(runs, results[0], strict=True):
        step = found["step"]
        assert found["content"] == content(states[step])
        assert (found["metadata"], found["count"]) == ({"data_order": step}, step)
        assert [damaged for damaged, _ in found["damage"]] == [2] * (step == 1)
        assert checkpoints(run) == (["1", "2"] if step == 2 else ["1"])
    for count in (4, 2, 1):
        with Checkpointer(runs[1]) as checkpointer:
            state, step, _ = checkpointer.restore(abstract_state(make_mesh(count)))
        assert (step, content(state)) == (2, content(states[2]))


# ---- Processes and disks that fail ----------------------------------------------------------------------------------


def test_process_killed_inside_a_save_loses_only_that_save(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    process = start(save=run, width=10 * WIDE)
    deadline = time.monotonic() + 120
    unfinished = run / "checkpoints" / "2.unsealed.orbax-checkpoint-tmp" / "params"
    while not unfinished.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoints(run) == ["1", "2.unsealed.orbax-checkpoint-tmp"]

    mesh, found = make_mesh(1), []
    with Checkpointer(run, on_damage=lambda *damage: found.append(damage)) as checkpointer:
        assert checkpoints(run) == ["1"]
        state, step, _ = checkpointer.restore(abstract_state(mesh, 10 * WIDE))
        assert step == 1 and content(state) == content(make_state(mesh, 1, 10 * WIDE))
        checkpointer.save(make_state(mesh, 2, 10 * WIDE), 2)
    assert checkpoints(run) == ["1", "2"] and not found


@pytest.mark.parametrize("sealed", [False, True])
def test_process_killed_between_orbax_and_the_rename_loses_only_that_save(saved, states, mesh, tmp_path, sealed):
    run = shutil.copytree(saved, tmp_path / "run")
    unsealed = (run / "checkpoints" / "2").rename(run / "checkpoints" / "2.unsealed")
    if not sealed:
        (unsealed / "checksums.json").unlink()
    with Checkpointer(run) as checkpointer:
        assert checkpoints(run) == ["1"] and checkpointer.restore(abstract_state(mesh))[1] == 1
        checkpointer.save(states[2], 2)
    assert checkpoints(run) == ["1", "2"]


def test_removal_cut_short_leaves_no_checkpoint_behind(saved, mesh, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    (run / "checkpoints" / "1").rename(run / "checkpoints" / "1.removed")
    with Checkpointer(run) as checkpointer:
        assert checkpointer.restore(abstract_state(mesh))[1] == 2
    assert checkpoints(run) == ["2"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount; the tests with limited file sizes cover failing writes")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_and_read_only_disks(mesh, small_disk):
    run = small_disk / "run"
    run.mkdir()
    with Checkpointer(run, keep=2) as checkpointer:
        checkpointer.save(make_state(mesh, 1, WIDE), 1)
        checkpointer.wait()
        filler = small_disk / "filler"
        for step, free in ((2, 200_000), (3, 0)):  # full while writing, and from the start
            filler.write_bytes(b"")
            filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - free))
            with pytest.raises(SaveFailed, match=f"checkpoints/{step} could not be saved: the disk is full; make room"):
                checkpointer.save(make_state(mesh, step, WIDE), step)
                checkpointer.wait()
            assert checkpoints(run) == ["1"] and checkpointer.latest_step() == 1
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(SaveFailed, match="the file system is read-only; make it writable"):
            checkpointer.save(make_state(mesh, 4, WIDE), 4)
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        checkpointer.save(make_state(mesh, 5, WIDE), 5)
        state, step, _ = checkpointer.restore(abstract_state(mesh, WIDE))
        assert step == 5 and content(state) == content(make_state(mesh, 5, WIDE))
    assert checkpoints(run) == ["1", "5"]


def test_vanished_folder_is_not_made_anew(saved, states, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    with Checkpointer(run) as checkpointer:
        run.rename(tmp_path / "elsewhere")
        for parent in (tmp_path, run):  # the mount point gone, or empty
            parent.mkdir(exist_ok=True)
            with pytest.raises(SaveFailed, match="the folder is gone; bring it back, or mount it again"):
                checkpointer.save(states[3], 3)
            assert not (run / "checkpoints").exists()
        run.rmdir()
        (tmp_path / "elsewhere").rename(run)
        checkpointer.save(states[3], 3)
    assert checkpoints(run) == ["1", "2", "3"]


def test_failed_save_is_reported_by_the_next_one_which_is_made_all_the_same(mesh, states, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpointer.save(make_state(mesh, 3, WIDE), 3)
            with pytest.raises(SaveFailed, match="checkpoints/3 could not be saved: the file would be") as caught:
                checkpointer.save(states[1], 4)  # small enough
            assert str(caught.value).endswith("; any earlier checkpoint is intact")  # though there is none
            assert "\n" not in str(caught.value) and caught.value.step == 3 and caught.value.exit_code == 2
            checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(tmp_path) == ["4"]


def test_failure_of_the_last_save_is_raised_at_the_end_but_hides_no_other_error(mesh, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SaveFailed, match="checkpoints/1 "), Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(make_state(mesh, 1, WIDE), 1)
        with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(make_state(mesh, 1, WIDE), 1)
            raise ZeroDivisionError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
