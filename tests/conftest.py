"""Shared fixtures. Every test runs with silent broadcasting turned into an error."""

import os
from pathlib import Path

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags, which pytest does not parse


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with `data/` (real infrared images) and `golden/` (published numbers), kept outside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("INFMAE_TEST_DATA", default))
    if not (folder / "data").is_dir():
        pytest.skip("no real images here: set INFMAE_TEST_DATA to the folder that holds data/ and golden/")
    return folder
