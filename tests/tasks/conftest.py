"""A pretrained encoder as small as can be, a labelled shard set, and runs of every task on them."""

import pytest

from data_pipelines.synthetic import write_shards
from infmae_jax.interop import load
from infmae_jax.models.config import InfMAEConfig
from tests.commands import run
from tests.tasks.cases import CASES, SETTINGS

TINY = dict(widths=(16, 16, 16), depths=(1, 1, 1), heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="session")
def encoder(made_once):
    """Run folder of an untrained encoder."""

    def fill(folder):
        trained = load.untrained(InfMAEConfig().replace(**TINY), (64, 64))
        load.write(folder / "encoder", "run", trained, (64, 64), {})

    return made_once("encoder", fill) / "encoder"


@pytest.fixture(scope="session")
def labelled(made_once):
    """mask kind -> shard set of 24 synthetic scenes of 80x104 pixels, 6 of them in the split val."""

    def fill(folder):
        for mask in ("surfaces", "targets"):
            write_shards(folder / mask, 24, size=(80, 104), mask=mask)

    return made_once("labelled", fill)


@pytest.fixture(scope="session")
def runs(encoder, labelled, made_once):
    """kind -> (run folder, what the command printed)."""

    def make(kind):
        module, mask = CASES[kind]

        def fill(folder):
            done = run(
                "infmae_jax.finetune", f"--config={module.__file__}:smoke", f"--checkpoint={encoder}",
                f"--workdir={folder / 'run'}", f"--config.data.shards={labelled / mask}", "--config.compilation_cache=",
                *(f"--config.head.{name}={value}" for name, value in SETTINGS.get(kind, {}).items()),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (folder / "printed.txt").write_text(done.stdout)

        folder = made_once(f"{kind}_run", fill)
        return folder / "run", (folder / "printed.txt").read_text()

    return make
