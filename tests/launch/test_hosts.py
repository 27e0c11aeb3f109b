"""GPU hosts and Slurm: what --dry-run prints is what is called, and when a Slurm job is requeued."""

import os
import signal
import time

import pytest

from tests.launch.conftest import check_dry_run

TRAINING = ["--config=configs/pretrain/inf30_base.py", "--workdir=/runs/a b", "--config.duration=3 steps"]
PRETRAIN = ["-m", "infmae_jax.pretrain"]


def test_gpu_host_bare(checkout):
    calls = check_dry_run(checkout, "launch/gpu_host.sh", "--times=3", "--", *TRAINING)
    assert calls == [["install.sh"], ["python", *PRETRAIN, *TRAINING]]


def test_gpu_host_container(checkout):
    checkout.stub("docker")
    options = ["--image=registry.example:5000/infmae:1", "--folders=/runs,/data/my shards"]
    (call,) = check_dry_run(checkout, "launch/gpu_host.sh", *options, "--", *TRAINING)
    at = call.index("registry.example:5000/infmae:1")
    assert call[at + 1 :] == ["python", *PRETRAIN, *TRAINING]
    assert call[:2] == ["docker", "run"] and {"--gpus=all", "--init", "--rm"} <= set(call[:at])
    assert {"--volume=/runs:/runs", "--volume=/data/my shards:/data/my shards"} <= set(call[:at])
    assert f"--user={os.getuid()}:{os.getgid()}" in call[:at]
    assert not any(word.startswith("--restart") for word in call)


def test_gpu_host_starts_a_killed_container_again(checkout):
    checkout.stub("docker", "if [ ! -e once ]; then touch once; exit 76; fi")
    (checkout.root / "launch" / "restart.sh").write_text(
        (checkout.root / "launch" / "restart.sh").read_text().replace("pause=30", "pause=0")
    )
    result = checkout.run("launch/gpu_host.sh", "--image=i:1", "--folders=/runs", "--", *TRAINING)
    assert result.returncode == 0 and len(checkout.take_calls()) == 2


def test_slurm_submission(checkout):
    checkout.stub("sbatch")
    options = ["--partition=gpu", "--time=4:00:00", "--nodes=2", "--gpus_per_node=4", "--account=a", "--qos=long"]
    install, call = check_dry_run(checkout, "launch/slurm.sh", *options, "--", *TRAINING)
    assert install == ["install.sh"]
    script = call.index(str(checkout.root / "launch" / "slurm_job.sh"))
    assert call[script + 1 :] == ["--requeues=50", "--", *TRAINING]
    assert set(call[1:script]) >= {
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=4:00:00", "--partition=gpu", "--account=a",
        "--qos=long", "--requeue", "--open-mode=append", "--signal=TERM@120", f"--chdir={checkout.root}",
    }  # fmt: skip
    assert (checkout.root / "runs" / "slurm").is_dir()  # Slurm makes no folder for the log


# Slurm in small: a process a task, the highest exit code of all. Tasks' process ids go to the file `tasks`.
SRUN = """
while [[ $1 == --* ]]; do shift; done
trap : TERM
set -m
for SLURM_PROCID in $(seq 0 $((TASKS - 1))); do
  export SLURM_PROCID
  "$@" &
  echo $! >>tasks
done
highest=0
for task in $(cat tasks); do
  while :; do
    code=0
    wait "$task" || code=$?
    kill -0 "$task" 2>/dev/null || break
  done
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""


@pytest.fixture
def slurm(checkout):
    """The checkout with srun and scontrol; the training ends with the code that CODES has for its task."""
    checkout.stub("srun", SRUN)
    checkout.stub("scontrol")
    checkout.stub("python", 'read -ra codes <<<"$CODES"; exit "${codes[SLURM_PROCID]}"', checkout.python)
    checkout.environment |= {"SLURM_JOB_ID": "42", "TASKS": "2"}
    return checkout


@pytest.mark.parametrize(
    "codes, code, requeued",
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("76 137", 137, True),  # one process killed, the other noticed
        ("2 76", 2, False),  # a mistake on one host: the other one's 76 must not win
        ("76 3", 3, False),
        ("1 76", 1, False),
        ("137 1", 1, False),
        ("130 130", 130, False),
        ("76 0", 76, True),
    ],
)
def test_slurm_requeues_by_exit_code(codes, code, requeued, slurm):
    slurm.environment["CODES"] = codes
    result = slurm.run("launch/slurm_job.sh", "--", *TRAINING)
    assert result.returncode == code, result.stderr
    calls = slurm.take_calls()
    trainings = [call for call in calls if call[0] == "python"]
    assert trainings == [["python", *PRETRAIN, "--config.distributed.method=slurm", *TRAINING]] * 2
    assert [call for call in calls if call[0] == "scontrol"] == [["scontrol", "requeue", "42"]] * requeued


def test_slurm_gives_up_requeueing(slurm):
    slurm.environment |= {"CODES": "76 76", "SLURM_RESTART_COUNT": "3"}
    result = slurm.run("launch/slurm_job.sh", "--requeues=3", "--", *TRAINING)
    assert result.returncode == 76 and "gave up after 3 requeues" in result.stderr
    assert "scontrol" not in [call[0] for call in slurm.take_calls()]


def test_slurm_job_dry_run(slurm):
    result = slurm.run("launch/slurm_job.sh", "--dry-run", "--", *TRAINING)
    assert result.returncode == 0 and slurm.take_calls() == []
    slurm.environment["CODES"] = "0 0"
    slurm.run("bash", "-c", result.stdout)
    printed = slurm.take_calls()[0]
    (slurm.root / "tasks").unlink()
    slurm.run("launch/slurm_job.sh", "--", *TRAINING)
    assert slurm.take_calls()[0] == printed


@pytest.mark.parametrize("cancelled", [False, True])
def test_slurm_sigterm(cancelled, slurm):
    """Before the time limit only the tasks are told: they save and the job is requeued. `scancel` tells all."""
    slurm.stub(
        "python",
        "trap 'echo saved >>saves; exit 75' TERM; echo >>ready; while :; do sleep 0.05; done",
        slurm.python,
    )
    process = slurm.start("launch/slurm_job.sh", "--", *TRAINING)
    ready, deadline = slurm.root / "ready", time.monotonic() + 30
    while not (ready.exists() and ready.read_text() == "\n\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    if cancelled:
        process.send_signal(signal.SIGTERM)
    for task in (slurm.root / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    assert process.wait(30) == 75, process.stderr.read()
    assert (slurm.root / "saves").read_text() == "saved\nsaved\n"
    requeued = ["scontrol", "requeue", "42"] in slurm.take_calls()
    assert requeued == (not cancelled)
