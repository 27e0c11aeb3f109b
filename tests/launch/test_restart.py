"""launch/restart.sh with real processes that exit, are killed, and are told to stop."""

import os
import signal
import time

import pytest

RESTARTED = ["exit 75", "exit 76", "kill -ABRT $$", "kill -KILL $$", "kill -SEGV $$", "kill -TERM $$"]
FINAL = [0, 1, 2, 3, 130, 127, 255]

# A training: says that it runs, saves on SIGTERM (75) and SIGINT (130), quits without saving on a second SIGINT.
TRAINING = """
saving=''
leave() { sleep 0.3; echo "saved $1" >>log; exit "$2"; }
trap 'leave TERM 75' TERM
trap 'if [ -n "$saving" ]; then echo quit >>log; exit 130; fi; saving=true; echo INT >>log' INT
echo "run $$" >>log
while :; do
  if [ -n "$saving" ]; then for _ in 1 2 3 4 5; do sleep 0.1; done; leave INT 130; fi
  sleep 0.05
done
"""


def restart(*options):
    return ["launch/restart.sh", "--pause=0", *options, "--"]


def wait_for(path, text, process):
    deadline = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)


def lines_of(checkout):
    return (checkout.root / "log").read_text().split("\n")[:-1]


@pytest.mark.parametrize("ending", RESTARTED)
def test_restarts_until_done(ending, checkout):
    script = f"echo run >>log; if [ $(wc -l <log) -lt 3 ]; then {ending}; fi"
    result = checkout.run(*restart(), "bash", "-c", script)
    assert result.returncode == 0 and lines_of(checkout) == ["run"] * 3, result.stderr
    assert "restart 2 of at most 10" in result.stderr


@pytest.mark.parametrize("code", FINAL)
def test_ends_with_the_command_s_code(code, checkout):
    result = checkout.run(*restart(), "bash", "-c", f"echo run >>log; exit {code}")
    assert result.returncode == code and lines_of(checkout) == ["run"]


def test_gives_up(checkout):
    result = checkout.run(*restart("--times=2"), "bash", "-c", "echo run >>log; kill -KILL $$")
    assert result.returncode == 137 and len(lines_of(checkout)) == 3
    assert "gave up after 2 restarts within 3600 s; the last exit code is 137" in result.stderr


def test_restarts_outside_the_window_do_not_count(checkout):
    script = "echo run >>log; if [ $(wc -l <log) -lt 6 ]; then exit 75; fi"
    assert checkout.run(*restart("--times=1", "--within=0"), "bash", "-c", script).returncode == 0
    assert len(lines_of(checkout)) == 6


@pytest.mark.parametrize("code, raised", [(0, 0), (1, 241), (2, 242), (3, 243), (75, 75), (130, 130)])
def test_final_codes_can_outbid_the_others(code, raised, checkout):
    result = checkout.run(*restart("--times=0", "--raise_final"), "bash", "-c", f"exit {code}")
    assert result.returncode == raised and result.stderr == ""


def test_missing_command(checkout):
    result = checkout.run(*restart(), "no-such-command")
    assert result.returncode == 127 and "no-such-command" in result.stderr


def test_arguments_arrive_untouched(checkout):
    words = ["a b", "", "$HOME", "'\"", "--times=3", "*", "new\nline"]
    result = checkout.run(*restart(), "printf", "%s\\0", *words)
    assert result.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_the_save_waited_for(sent, code, checkout):
    process = checkout.start(*restart(), "bash", "-c", TRAINING)
    wait_for(checkout.root / "log", "run", process)
    process.send_signal(sent)
    assert process.wait(30) == code, process.stderr.read()
    lines = lines_of(checkout)
    assert [line for line in lines if line.startswith("run")] == lines[:1]  # not started again
    assert lines[-1] == f"saved {sent.name[3:]}"
    assert process.stderr.read() == ""  # nor meant to be
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines[0].split()[1]), 0)


def test_ctrl_c_reaches_the_command_once(checkout):
    """A terminal sends SIGINT to the whole process group; twice would mean: quit without saving."""
    process = checkout.start(*restart(), "bash", "-c", TRAINING)
    wait_for(checkout.root / "log", "run", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert lines_of(checkout)[1:] == ["INT", "saved INT"]


def test_ctrl_c_twice_quits(checkout):
    process = checkout.start(*restart(), "bash", "-c", TRAINING)
    wait_for(checkout.root / "log", "run", process)
    process.send_signal(signal.SIGINT)
    wait_for(checkout.root / "log", "INT", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert lines_of(checkout)[1:] == ["INT", "quit"]


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_runs_ends_it(sent, code, checkout):
    process = checkout.start("launch/restart.sh", "--pause=60", "--", "bash", "-c", "echo run >>log; exit 76")
    while "next run" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(sent)
    assert process.wait(30) == code
    assert lines_of(checkout) == ["run"]


def test_signals_at_random_moments_never_leave_a_process_behind(checkout):
    """Also while the command is being started, and while it is already leaving."""
    for trial in range(12):
        process = checkout.start(*restart(), "bash", "-c", TRAINING)
        time.sleep(0.01 * trial)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (75, 143, -signal.SIGTERM)
    for line in lines_of(checkout):
        if line.startswith("run"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(line.split()[1]), 0)
