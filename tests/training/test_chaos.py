"""Random faults, one after the other, against tiny runs: whatever happens, the run ends as if nothing had.

A short form, of one process, runs with the other tests. The long one, side by side with one of two hosts and half as
many faults; it prints its faults and seed at the end:

    launch/test.sh tests/training/test_chaos.py --long --chaos=36 --chaos-seed=1 --dist=load -rP
"""

import collections
import shutil

import numpy as np

from tests.training import chaos
from tests.training.jobs import SMALLEST, Job, assert_same_run, beginnings, checkpoints

SAVE_EVERY = 10
SETUPS = {1: chaos.ONE_PROCESS, 2: chaos.TWO_PROCESSES}


def start(run, shards, processes, steps):
    return Job(
        run, shards, *SMALLEST, f"--config.duration={steps} steps", f"--config.checkpoint_every={SAVE_EVERY} steps",
        "--config.data.workers=1", "--config.data.max_corrupt=0.0", "--config.distributed.heartbeat_seconds=6",
        "--config.optimizer.base_learning_rate=0.02", processes=processes, devices=2 // processes,
    )  # fmt: skip


def kinds_in_random_order(kinds, rng):
    """Every kind once, then every kind again, for ever."""
    while True:
        yield from (list(kinds)[i] for i in rng.permutation(len(kinds)))


def assert_nothing_lost(run, saved, fault):
    """The process that came after a fault went on from the last completed save (or, of a damaged one, that before)."""
    began = beginnings(run)[-1]
    wanted = saved[-1:] + saved[-2:-1] * fault.damaged_newest
    assert began in wanted or not saved, f"went on at step {began} with checkpoints {saved}"


def pytest_generate_tests(metafunc):
    metafunc.parametrize("processes", SETUPS if metafunc.config.getoption("--long") else [1])


def test_faults_change_nothing(processes, shards, tmp_path, pytestconfig):
    count, seed = -(-pytestconfig.getoption("--chaos") // processes), pytestconfig.getoption("--chaos-seed")
    steps = 120 if pytestconfig.getoption("--long") else 60
    rng = np.random.default_rng([seed, processes])
    kinds = kinds_in_random_order(SETUPS[processes], rng)
    copy = shutil.copytree(shards, tmp_path / "shards")
    with start(tmp_path / "undisturbed", copy, processes, steps) as job:
        job.succeeded()
    disk = chaos.Disk(tmp_path / "disk")
    done, runs = collections.Counter(), 0
    try:
        while sum(done.values()) < count:
            run, runs = disk.folder / f"run{runs}", runs + 1
            finished, before = False, None
            while not finished:
                strike = sum(done.values()) < count
                kind = next(kinds) if strike else None
                with start(run, copy, processes, steps) as job:
                    fault = chaos.Fault(job, rng, disk, copy, steps)
                    try:
                        if not strike:
                            job.succeeded()
                            raise chaos.TooLate
                        SETUPS[processes][kind](fault)
                        done[kind] += 1
                        print(f"{processes} process(es), fault {sum(done.values())} of {count}: {kind}", flush=True)
                    except chaos.TooLate:
                        job.succeeded()
                        finished = True
                if before is not None:
                    assert_nothing_lost(run, *before)
                before = checkpoints(run), fault
            assert_same_run(run, tmp_path / "undisturbed")
            shutil.rmtree(run)
    finally:
        disk.close()
    print(f"{processes} process(es), seed {seed}, {runs} runs, {sum(done.values())} faults: {dict(done)}", flush=True)
