import pytest

from tests.reporting.run_folders import make_eventful_run


@pytest.fixture
def eventful(tmp_path):
    return make_eventful_run(tmp_path / "run")
