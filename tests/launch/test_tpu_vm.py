"""TPU VMs: a scripted gcloud walks through the states of a queued resource; the worker's script with stubs."""

import pytest

from tests.launch.conftest import SECRET, words_of

TRAINING = ["--config=configs/pretrain/inf30_base.py", "--workdir=/mnt/infmae/a b", "--config.data.shards=/x,/y"]
WHERE = ["--project=p", "--zone=us-west4-a", "--name=run1"]
WHAT = [
    "--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite", "--capacity=spot",
    "--image=registry.example/infmae:1", "--mount=10.0.0.2:/share", "--poll=0",
]  # fmt: skip

# Every look at the queue takes the next line of `states`: a state and, when ACTIVE, what the workers say. The line
# "none" is an empty answer, "error" a failing gcloud.
GCLOUD = r"""
case " $* " in
  *" list "*)
    read -r state _ <states
    case $state in error) sed -i 1d states; exit 1 ;; none) ;; *) echo "$state" ;; esac
    if [ "$state" != ACTIVE ]; then sed -i 1d states; fi ;;
  *"docker inspect"*)
    read -r _ workers <states
    sed -i 1d states
    if [ "$workers" = unreachable ]; then exit 255; fi
    tr ' ' '\n' <<<"$workers" ;;
  *" create "*) if [ -e refuse ]; then exit 1; fi ;;
esac
"""


def run(checkout, states, *options):
    """Runs tpu_vm.sh through these states; returns the result and the names of the calls that change something."""
    checkout.stub("gcloud", GCLOUD)
    (checkout.root / "states").write_text("".join(f"{line}\n" for line in states))
    result = checkout.run("launch/tpu_vm.sh", "run", *WHERE, *WHAT, *options, "--", *TRAINING)
    calls = checkout.take_calls()
    assert (checkout.root / "states").read_text() == "", "not all states were looked at"
    words = {"create": "create", "delete": "delete", "logs": "docker logs"}
    return result, [name for call in calls for name, word in words.items() if word in " ".join(call)], calls


RUNNING = "ACTIVE running:0 running:0"
DONE = ["ACTIVE exited:0 exited:0"] * 2


@pytest.mark.parametrize(
    "states, code, changes",
    [
        (["none", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE starting:0 starting:0", RUNNING, *DONE],
         0, ["create", "delete"]),
        # Preempted while running, and once while waiting for its workers; out of reach for a moment.
        (["none", RUNNING, "ACTIVE unreachable", "SUSPENDING", "SUSPENDED", "DELETING", "none", "FAILED", "none",
          RUNNING, *DONE], 0, ["create", "delete"] * 3),
        # Watching a slice that an earlier `run` made, through a gcloud that fails for a while.
        (["error", RUNNING, "error", *DONE], 0, ["delete"]),
        # One worker's mistake is the job's: the others only wait for it.
        ([RUNNING, *["ACTIVE running:0 exited:2"] * 2], 2, ["logs", "delete"]),
        (["ACTIVE exited:3 exited:3"] * 2, 3, ["logs", "delete"]),
        # The restart rule gave up on all workers, or they were told to stop: 75.
        (["ACTIVE exited:75 running:0", *["ACTIVE exited:75 exited:75"] * 2], 75, ["logs", "delete"]),
        # After a reboot, the dead container of before is seen until the startup script has removed it.
        (["ACTIVE exited:255 running:0", RUNNING, "ACTIVE exited:137 exited:137", RUNNING, *DONE], 0, ["delete"]),
        (["ACTIVE exited:0 running:0", "ACTIVE exited:0 running:0", *DONE], 0, ["delete"]),
    ],
)  # fmt: skip
def test_run(states, code, changes, checkout):
    result, changed, _ = run(checkout, states)
    assert (result.returncode, changed) == (code, changes), result.stdout + result.stderr


def test_keep(checkout):
    result, changed, _ = run(checkout, DONE, "--keep")
    assert result.returncode == 0 and changed == [] and "costing money" in result.stdout


def test_a_request_refused_at_first_ends_it(checkout):
    (checkout.root / "refuse").touch()
    result, changed, _ = run(checkout, ["none"])
    assert result.returncode == 2 and changed == ["create"]


def test_a_request_refused_later_is_made_again(checkout):
    (checkout.root / "refuse").touch()
    result, changed, _ = run(checkout, [RUNNING, "SUSPENDED", *["none"] * 4], "--times=2")
    assert result.returncode == 2 and changed == ["delete", "create", "create", "create"]
    assert "gave up after asking for 3 slices" in result.stderr


def test_dry_run_prints_what_run_calls(checkout):
    result, _, calls = run(checkout, ["none", RUNNING, "SUSPENDED", "none", *["ACTIVE exited:2 running:0"] * 2])
    assert result.returncode == 2
    dry = checkout.run("launch/tpu_vm.sh", "run", "--dry-run", *WHERE, *WHAT, "--", *TRAINING)
    assert dry.returncode == 0 and checkout.take_calls() == []
    printed = words_of(dry.stdout)
    assert all(call in printed for call in calls) and all(call in calls for call in printed)


@pytest.mark.parametrize("capacity, flag", [("spot", {"--spot"}), ("reserved", {"--reserved"}), ("on_demand", set())])
def test_request(capacity, flag, checkout):
    options = [*WHERE, *WHAT, f"--capacity={capacity}", "--slices=2", "--service_account=a@b"]
    dry = checkout.run("launch/tpu_vm.sh", "run", "--dry-run", *options, "--", *TRAINING)
    (create,) = [call for call in words_of(dry.stdout) if "create" in call]
    assert {"--spot", "--reserved"} & set(create) == flag
    assert {"--node-count=2", "--node-prefix=run1", "--service-account=a@b"} <= set(create)
    (metadata,) = [word for word in create if word.startswith("--metadata=")]
    assert metadata.startswith("--metadata=^|^infmae-image=registry.example/infmae:1|infmae-mount=10.0.0.2:/share|")
    assert f"|infmae-secret={SECRET}|" in metadata


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("action", ["status", "logs", "stop", "delete", "start"])
def test_other_actions(action, existing, checkout):
    checkout.stub("gcloud")
    options = [action, *WHERE, *["--existing"] * existing]
    if action == "start":
        options += [*WHAT, "--", *TRAINING]
    real = checkout.run("launch/tpu_vm.sh", *options)
    if (action, existing) in {("start", False), ("delete", True)}:
        assert real.returncode == 2 and checkout.take_calls() == []
        return
    calls = checkout.take_calls()
    dry = checkout.run("launch/tpu_vm.sh", action, "--dry-run", *options[1:])
    assert real.returncode == 0 and words_of(dry.stdout) == calls and checkout.take_calls() == []
    assert {tuple(call[:4]) for call in calls} == {
        ("gcloud", "compute", "tpus", "tpu-vm" if existing else "queued-resources")
    }
    if action == "start":  # the command that arrives on the workers holds the training's arguments unharmed
        command = calls[1][-1].removeprefix("--command=")
        assert words_of(words_of(command)[0][4].removeprefix("INFMAE_ARGUMENTS=")) == [TRAINING]
        assert f"INFMAE_SECRET={SECRET}" in words_of(command)[0]


@pytest.fixture
def worker(checkout):
    """The checkout with everything a TPU VM's worker has; the metadata server answers from the environment."""
    checkout.stub("curl", 'case ${!#} in */infmae-image) echo "$IMAGE" ;; */infmae-mount) echo "$MOUNT" ;; '
                  '*/infmae-arguments) echo "$ARGUMENTS" ;; '
                  '*/infmae-secret) echo "$SECRET" ;; *) exit 22 ;; esac')  # fmt: skip
    checkout.stub("docker", 'if [ "$1" = container ]; then exit 1; fi')
    checkout.stub("mountpoint", "exit 1")
    for name in ("mkdir", "mount", "mount.nfs", "gcsfuse", "gcloud", "apt-get"):
        checkout.stub(name)
    checkout.environment |= {
        "INFMAE_STATE": str(checkout.root / "state"), "INFMAE_RETRY_SECONDS": "0", "IMAGE": "registry.example/infmae:1",
        "MOUNT": "10.0.0.2:/share", "SECRET": SECRET,
        "ARGUMENTS": "--config=c.py '--workdir=/mnt/infmae/a b' '--config.x=$HOME'",
    }  # fmt: skip
    return checkout


LOOKING = {"curl", "mountpoint"}


@pytest.mark.parametrize(
    "mount, mounted",
    [
        ("10.0.0.2:/share", ["mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share", "/mnt/infmae"]),
        ("gs://bucket", ["gcsfuse", "--implicit-dirs", "-o", "allow_other", "bucket", "/mnt/infmae"]),
    ],
)
def test_worker(mount, mounted, worker):
    worker.environment["MOUNT"] = mount
    worker.stub("docker", 'echo "$INFMAE_JOB_SECRET" >secret; if [ "$1" = container ]; then exit 1; fi')
    result = worker.run("launch/tpu_worker.sh")
    assert result.returncode == 0, result.stderr
    calls = [c for c in worker.take_calls() if c[0] not in LOOKING and c[:2] != ["docker", "container"]]
    *before, pull, run_call = calls
    assert "--env=INFMAE_JOB_SECRET" in run_call and SECRET not in " ".join(run_call)  # it comes by the environment
    assert (worker.root / "secret").read_text() == f"{SECRET}\n"
    assert before == [["mkdir", "-p", "/mnt/infmae"], mounted,
                      ["gcloud", "auth", "configure-docker", "registry.example", "--quiet"]]  # fmt: skip
    assert pull == ["docker", "pull", "registry.example/infmae:1"]
    at = run_call.index("registry.example/infmae:1")
    assert run_call[at + 1 : at + 6] == ["launch/restart.sh", "--", "python", "-m", "infmae_jax.pretrain"]
    assert run_call[-3:] == ["--config=c.py", "--workdir=/mnt/infmae/a b", "--config.x=$HOME"]
    assert "--config.distributed.method=tpu" in run_call and "--volume=/mnt/infmae:/mnt/infmae" in run_call[:at]
    assert (worker.root / "state").read_text() == "starting:0\n"
    dry = worker.run("launch/tpu_worker.sh", "--dry-run")
    assert words_of(dry.stdout) == calls


def test_worker_stops_the_training_of_before_gently(worker):
    worker.stub("docker")
    assert worker.run("launch/tpu_worker.sh").returncode == 0
    calls = [call[:2] for call in worker.take_calls() if call[0] == "docker"]
    assert calls[1:3] == [["docker", "stop"], ["docker", "rm"]]


def test_worker_tries_again_and_then_says_that_it_failed(worker):
    worker.stub("docker", 'if [ "$1" != run ]; then exit 1; fi')
    result = worker.run("launch/tpu_worker.sh")
    assert result.returncode == 1 and (worker.root / "state").read_text() == "exited:2\n"
    calls = worker.take_calls()
    assert len([call for call in calls if call[:2] == ["docker", "pull"]]) == 5
    assert not [call for call in calls if call[:2] == ["docker", "run"]]


def test_worker_takes_settings_from_the_environment(worker):
    worker.stub("curl", "exit 6")
    worker.environment |= {"INFMAE_IMAGE": "i:1", "INFMAE_MOUNT": "h:/s", "INFMAE_ARGUMENTS": "--config=c.py"}
    assert worker.run("launch/tpu_worker.sh").returncode == 0
    assert worker.take_calls()[-1][-1] == "--config=c.py"
