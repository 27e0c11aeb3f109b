"""A pretrained encoder as small as can be, a labelled shard set, and runs of every task on them."""

import pytest

from data_pipelines.synthetic import write_shards
from infmae_jax.interop import load
from infmae_jax.models.config import InfMAEConfig
from tests.commands import run
from tests.tasks.cases import CASES

TINY = dict(widths=(16, 16, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Run folder of an untrained encoder."""
    path = tmp_path_factory.mktemp("encoder") / "encoder"
    trained = load.untrained(InfMAEConfig().replace(**TINY), (64, 64))
    load.write(path, "run", trained, (64, 64), {})
    return path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """mask kind -> shard set of 24 synthetic scenes of 80x104 pixels, 6 of them in the split val."""
    folder = tmp_path_factory.mktemp("labelled")
    for mask in ("surfaces", "targets"):
        write_shards(folder / mask, 24, size=(80, 104), mask=mask)
    return folder


@pytest.fixture(scope="session")
def runs(encoder, labelled, tmp_path_factory):
    """kind -> (run folder, what the command printed)."""
    made = {}

    def make(kind):
        if kind not in made:
            folder, (module, mask) = tmp_path_factory.mktemp(kind) / "run", CASES[kind]
            done = run(
                "infmae_jax.finetune", f"--config={module.__file__}:smoke", f"--checkpoint={encoder}",
                f"--workdir={folder}", f"--config.data.shards={labelled / mask}", "--config.compilation_cache=",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            made[kind] = folder, done.stdout
        return made[kind]

    return make
