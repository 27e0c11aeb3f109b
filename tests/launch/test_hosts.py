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


@pytest.fixture
def slurm(checkout):
    """The checkout with scontrol, and an srun that ends with the exit code CODE."""
    checkout.stub("srun", 'echo "$INFMAE_JOB_SECRET" >>secrets; exit "$CODE"')
    checkout.stub("scontrol")
    checkout.environment |= {"SLURM_JOB_ID": "42", "CODE": "0"}
    return checkout


@pytest.mark.parametrize(
    "reported, code, requeued",
    [
        (0, 0, False), (75, 75, True), (76, 76, True), (137, 137, True), (130, 130, False),
        (241, 1, False), (242, 2, False), (243, 3, False),  # as restart.sh --raise_final raises 1, 2, 3
    ],
)  # fmt: skip
def test_slurm_requeues_by_exit_code(reported, code, requeued, slurm):
    slurm.environment["CODE"] = str(reported)
    result = slurm.run("launch/slurm_job.sh", "--", *TRAINING)
    assert result.returncode == code, result.stderr
    srun, *rest = slurm.take_calls()
    assert srun[srun.index("launch/restart.sh") :] == [
        "launch/restart.sh", "--times=0", "--raise_final", "--", ".venv/bin/python", *PRETRAIN,
        "--config.distributed.method=slurm", *TRAINING,
    ]  # fmt: skip
    assert rest == [["scontrol", "requeue", "42"]] * requeued


def test_codes_that_forbid_a_restart_are_the_highest(checkout):
    """Slurm reports the highest exit code of a step's tasks: a mistake on one host must outbid the others' 76."""
    script = "source launch/steps.sh; for code in $(seq 0 143); do raise_final_code $code; done"
    raised = [int(line) for line in checkout.run("bash", "-c", script).stdout.split()]
    forbidding = raised[1:4]
    assert min(forbidding) > max(code for code in raised if code not in forbidding) and max(forbidding) < 256
    script = "source launch/steps.sh; for code in 241 242 243 75; do lower_final_code $code; done"
    lowered = checkout.run("bash", "-c", script)
    assert lowered.stdout.split() == ["1", "2", "3", "75"]


def test_tasks_share_a_secret_that_each_attempt_makes(slurm):
    del slurm.environment["INFMAE_JOB_SECRET"]
    for _ in range(2):
        assert slurm.run("launch/slurm_job.sh", "--", *TRAINING).returncode == 0
    secrets = (slurm.root / "secrets").read_text().split()
    assert len(set(secrets)) == 2 and all(len(secret) == 64 for secret in secrets)
    slurm.environment["INFMAE_JOB_SECRET"] = "short"
    result = slurm.run("launch/slurm_job.sh", "--", *TRAINING)
    assert result.returncode == 2 and "INFMAE_JOB_SECRET must be at least 16" in result.stderr


def test_slurm_gives_up_requeueing(slurm):
    slurm.environment |= {"CODE": "76", "SLURM_RESTART_COUNT": "3"}
    result = slurm.run("launch/slurm_job.sh", "--requeues=3", "--", *TRAINING)
    assert result.returncode == 76 and "gave up after 3 requeues" in result.stderr
    assert "scontrol" not in [call[0] for call in slurm.take_calls()]


def test_slurm_job_dry_run(slurm):
    assert check_dry_run(slurm, "launch/slurm_job.sh", "--", *TRAINING)[0][0] == "srun"


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_cancelled_slurm_job_is_not_requeued(cancelled, slurm):
    """Before the time limit only the tasks get SIGTERM: they save and the job is requeued. `scancel` tells all."""
    slurm.stub("srun", "trap '' TERM; touch ready; while [ ! -e saved ]; do sleep 0.02; done; exit 75")
    process = slurm.start("launch/slurm_job.sh", "--", *TRAINING)
    deadline = time.monotonic() + 30
    while not (slurm.root / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    if cancelled:
        process.send_signal(signal.SIGTERM)
    (slurm.root / "saved").touch()
    assert process.wait(30) == 75, process.stderr.read()
    assert (["scontrol", "requeue", "42"] in slurm.take_calls()) == (not cancelled)
