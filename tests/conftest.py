"""Shared fixtures. Every test runs with silent broadcasting turned into an error."""

import atexit
import fcntl
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Programs compiled once serve the whole session, the processes that tests start included.
_cache = tempfile.mkdtemp(prefix="infmae-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("INFMAE_JOB_SECRET", "of the processes that tests start")
# Most of the time goes into compiling small programs that run once: the compiler need not try hard.
_flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have left this faster way behind
    _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}"

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Begun first, so that no process is left with one of them when the others have nothing more to do.
_LONGEST_FILES = (
    "test_configs.py", "training/test_chaos.py", "training/test_hosts.py", "training/test_loop.py",
    "tasks/test_finetune.py", "tasks/test_detect.py", "training/test_collectives.py", "models/test_exactness.py",
    "data_pipelines/test_pipeline.py", "test_outputs.py", "data_pipelines/test_prepare.py", "training/test_resume.py",
    "tasks/test_hostile_runs.py", "bench/test_flops.py", "models/test_bfloat16.py", "bench/test_step.py",
)  # fmt: skip

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags, which pytest does not parse


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also what short forms cover: larger models, more hosts")
    help_chaos = "faults in tests/training/test_chaos.py; half as many with two hosts"
    parser.addoption("--chaos", type=int, default=2, help=help_chaos)
    parser.addoption("--chaos-seed", type=int, default=0, help="which faults, when and where")


def pytest_collection_modifyitems(items):
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(_LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with `data/` (real infrared images) and `golden/` (published numbers), kept outside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("INFMAE_TEST_DATA", default))
    if not (folder / "data").is_dir():
        pytest.skip("no real images here: set INFMAE_TEST_DATA to the folder that holds data/ and golden/")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """(name, function that fills a folder) -> the folder, filled by the first of the session's processes that asks."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, fill):
        folder, done = shared / f"shared_{name}", shared / f"shared_{name}.done"
        with (shared / f"shared_{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def scenes(made_once) -> Path:
    """A folder of 24 labelled synthetic scenes, 96x128."""
    from data_pipelines.synthetic import write_dataset

    return made_once("scenes", lambda at: write_dataset(at / "scenes", 24, seed=0, size=(96, 128))) / "scenes"


@pytest.fixture(scope="session")
def shards(scenes, made_once) -> Path:
    """The same scenes as a shard set."""
    from data_pipelines.prepare import prepare

    images = [scenes / "images"]
    return made_once("shards", lambda at: prepare(images, at / "shards", workers=0)) / "shards"


# Settings that do not change the compiled step.
_NOT_COMPILED = (
    "checkpoint_every", "log_every", "picture_every", "on_save_failure", "observe", "init_from", "compilation_cache",
)  # fmt: skip


@pytest.fixture(scope="module")
def steps_compiled_once():
    """Pretraining runs of a module share what is the same: the compiled step, the first state, traced shapes."""
    from infmae_jax.tasks.pretrain import PretrainTask
    from infmae_jax.training.program import Program

    build, start, trace = Program.compiled.func, Program.start, Program._param_shapes.func
    steps, states, shapes = {}, {}, {}

    def compiled(program):
        settings = {name: value for name, value in vars(program.config).items() if name not in _NOT_COMPILED}
        key = type(program.task).loss, getattr(program.task, "what", ""), repr(settings), program.mesh
        if not isinstance(program.task, PretrainTask):
            key = program
        if key not in steps:
            steps[key] = build(program)
        return steps[key]

    def first_state(program, initial=None):
        if initial is not None or not isinstance(program.task, PretrainTask):
            return start(program, initial)
        key = repr(program.config.model), program.config.seed, program.mesh
        if key not in states:
            states[key] = jax.device_get(start(program))
        return jax.device_put(states[key], program.shardings)

    def param_shapes(program):
        if not isinstance(program.task, PretrainTask):
            return trace(program)
        key = repr(program.config.model), repr(program.task.batch_spec)
        if key not in shapes:
            shapes[key] = trace(program)
        return shapes[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compiled", property(compiled))
        patch.setattr(Program, "_param_shapes", property(param_shapes))
        patch.setattr(Program, "start", first_state)
        yield
