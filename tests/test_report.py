"""The command: a page and a summary, or one line about what is wrong."""

import pytest
from absl import flags

from data_pipelines.errors import InputError
from infmae_jax import report
from tests.reporting.run_folders import make_eventful_run, parse


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: arguments -> what it prints."""
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "", flag_values=values)
    monkeypatch.setattr(report.flags, "FLAGS", values)

    def run(*arguments):
        report.main(values(["report", *map(str, arguments)]))
        return capsys.readouterr().out

    return run


def test_command(tmp_path, command):
    eventful = make_eventful_run(tmp_path / "run")
    printed = command(eventful, f"--output={tmp_path}/page.html")
    assert "status                    finished" in printed and f"{tmp_path}/page.html" in printed
    assert parse(tmp_path / "page.html").count("figure") == 8 + 4


@pytest.mark.parametrize("name", ["config.json", "x.txt"])
def test_the_page_replaces_no_file_of_the_run(name, tmp_path, command):
    eventful = make_eventful_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in eventful.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"{name} is no page: name a file that ends in .html"):
        command(eventful, f"--output={eventful}/{name}")
    assert {path: path.read_bytes() for path in eventful.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments, message", [((), "give one run folder"), (("nowhere",), "nowhere is not a run")])
def test_command_mistakes(arguments, message, command):
    with pytest.raises(InputError, match=message):
        command(*arguments)
