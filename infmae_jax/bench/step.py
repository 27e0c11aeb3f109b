"""The training step: images per second, MFU, memory and compile time; on request in turns with PyTorch.

What is measured is the program that trains (`training.program.Program`), on one device.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from infmae_jax.bench import flops, timing
from infmae_jax.bench.results import Row, report
from infmae_jax.models.patches import token_grid
from infmae_jax.tasks.finetuned import KINDS
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask
from infmae_jax.training import sharding
from infmae_jax.training.config import MeshConfig, RunConfig
from infmae_jax.training.hardware import mfu
from infmae_jax.training.optimizer import peak_learning_rate
from infmae_jax.training.program import Program
from infmae_jax.training.task import Task

Config = TypeVar("Config", bound=RunConfig)
TORCH_FORMS = ("eager", "compiled")
_GIB = 2**30
_SAME_LOSS = {"float32": 1e-5, "bfloat16": 1e-2}  # of two frameworks, relative
_MFU_NOTE = (
    "mfu: useful operations (on visible patches, by hand count) over time and the device's peak; '-' where the peak "
    "is unknown, as of CPUs. memory_gib: state, batch and temporaries of the compiled program."
)
FASTER_NOTE = "first_is_faster_by: the first way that could be measured, against this one in the same rounds."


class TimedStep:
    """The compiled step of a config for batches of a size, and a synthetic batch; no arrays are made until `start`.

    Attributes:
      compile_seconds: tracing and compiling, without the persistent cache.
      memory_gib: of the device while it steps, by the compiled program: state, batch and temporaries.
    """

    def __init__(self, config: RunConfig, batch: int):
        self.config = endless_run(config, batch)
        self.batch, self.state, self._batch = batch, None, None
        mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
        self.program = Program.build(task_of(self.config), self.config, mesh)
        since = time.perf_counter()
        memory = self.program.compiled.memory_analysis()
        self.compile_seconds = time.perf_counter() - since
        # The new state takes the place of the old one.
        self.memory_gib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / _GIB

    def start(self) -> None:
        """Makes the state and the batch."""
        self.state = self.program.start()
        self._batch = self.program.place(synthetic_batch(self.program.task))

    def __call__(self, times: int = 1) -> float:
        """Makes so many updates, waits for the last one and returns its loss."""
        for _ in range(times):
            self.state, metrics = self.program.step(self.state, self._batch)
        return float(metrics["loss"])

    def stop(self) -> None:
        """Gives the arrays' memory back."""
        for leaf in jax.tree.leaves((self.state, self._batch)):
            leaf.delete()


def task_of(config: RunConfig) -> Task:
    """The task of a config of pretraining or, with random weights, of fine-tuning."""
    return PretrainTask(config) if isinstance(config, PretrainConfig) else KINDS[config.task].task(config, None)


def endless_run(config: Config, batch: int) -> Config:
    """The config with batches of this size, and a learning rate that stays at its peak; no duration is in epochs."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, warmup="0 steps"),
        guards=dataclasses.replace(config.guards, spike_warmup="0 steps"),
        duration=f"{10**9} steps",
    )


def settings_of(config: PretrainConfig) -> dict[str, Any]:
    """What a measurement of the model should say it was made with."""
    return {"image_size": list(config.data.image_size), "dtype": config.model.encoder.dtype}


def visible_tokens(config: PretrainConfig) -> int:
    """K, the tokens that the config's mask keeps of an image."""
    return int(PretrainTask(config).batch_spec["ids_keep"][0][1])


def synthetic_batch(task: Task) -> dict[str, np.ndarray]:
    """A batch of a task: noise, random tokens without repeats, masks of two classes; other labels are zeros."""
    rng = np.random.default_rng(0)
    spec = task.batch_spec
    batch, height, width, _ = spec["image"][0]
    found = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
    found["image"] = rng.integers(0, 256, (batch, height, width, 1), np.uint8)
    if "ids_keep" in spec:
        tokens = np.tile(np.arange(np.prod(token_grid(height, width)), dtype=np.int32), (batch, 1))
        found["ids_keep"] = np.ascontiguousarray(rng.permuted(tokens, axis=1)[:, : spec["ids_keep"][0][1]])
    if "mask" in spec:
        found["mask"] = rng.integers(0, 2, (batch, height, width), np.uint8)
    return found


def step(
    config: PretrainConfig, batch_sizes: Sequence[int], rounds: int, torch_forms: Sequence[str] = ()
) -> dict[str, Any]:
    """Our training step at several batch sizes: on visible patches and as published in turns or, with `torch_forms`, in
    turns with PyTorch; InputError where that is not installed, "failed" where its first loss is another."""
    ways = {"ours": {}} if torch_forms else flops.WAYS
    rows: list[Row] = []
    for batch in batch_sizes:
        found = compared(config, batch, rounds, ways, torch_forms)
        rows += [{"name": f"batch {batch}, {way}"} | row for way, row in found.items()]
    told = report("step", settings_of(config) | {"rounds": rounds}, rows, [_MFU_NOTE, FASTER_NOTE])
    # Where PyTorch computes something else, one of the two is wrong.
    return told | {"failed": True} if torch_forms and any("note" in row for row in rows) else told


def compared(
    config: PretrainConfig,
    batch: int,
    rounds: int,
    ways: Mapping[str, dict[str, Any]],
    torch_forms: Sequence[str] = (),
    look: Callable[[TimedStep], Row] = lambda _: {},
    threads: int = 1,
) -> dict[str, Row]:
    """The step computed in several ways, in turns, from the same weights and on the same batch.

    A way that fails, or whose first loss differs from the first one's by more than rounding, is a row with a note in
    place of figures; the first one may fail for want of memory only.

    Args:
      ways: name -> changes of the model's config.
      torch_forms: of `TORCH_FORMS`: "eager", attention written out; "compiled", torch.compile with fused attention and
        AdamW.
      look: what else to say of a way; may train it on.
      threads: programs that are compiled at once.
    """
    rows: dict[str, Row] = {}
    programs: dict[str, TimedStep] = {}

    def compiled(change: dict[str, Any]) -> TimedStep:
        return TimedStep(dataclasses.replace(config, model=config.model.replace(**change)), batch)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:  # XLA compiles without Python's lock
        begun = {name: pool.submit(compiled, change) for name, change in ways.items()}
    for name, made in begun.items():
        try:
            programs[name] = program = made.result()
            program.start()
            rows[name] = {"first_loss": program(), **look(program)}
        except Exception as error:  # what this device lacks, or has too little of
            no_room = "RESOURCE_EXHAUSTED" in str(error)
            if not rows and (torch_forms or not no_room):
                raise
            reason = "does not fit the device's memory" if no_room else " ".join(str(error).split())[:200]
            rows[name] = {"note": f"failed: {reason}"}
            if name in programs:
                programs.pop(name).stop()
    calls: dict[str, timing.Call] = dict(programs)
    if torch_forms:
        params = programs[next(iter(ways))].program.start().params
        for name, call in torch_steps(config, batch, params, torch_forms).items():
            calls[name], rows[name] = call, {"first_loss": call(1)}
    first = next(iter(calls), "")
    tolerance = _SAME_LOSS[config.model.encoder.dtype]
    for name in list(calls):
        if not np.isclose(rows[name]["first_loss"], rows[first]["first_loss"], rtol=tolerance, atol=0):
            rows[name]["note"] = "another first loss: not the same computation"
            del calls[name]
    for name, seconds in (timed := timing.take_turns(calls, rounds)).items():
        rows[name] |= measures(programs[name], seconds) if name in programs else timing.rate_row(seconds, batch)
        if name != first:
            rows[name]["first_is_faster_by"] = timing.ratio(seconds, timed[first])
    for program in programs.values():
        program.stop()
    return rows


def torch_steps(config: PretrainConfig, batch: int, params: Any, forms: Sequence[str]) -> dict[str, timing.Call]:
    """PyTorch's step in each of the forms, from these parameters, on the batch that `TimedStep` has."""
    from infmae_jax.bench import torch_model

    params, arrays = jax.device_get(params), synthetic_batch(PretrainTask(endless_run(config, batch)))
    inputs = torch_model.batch(arrays["image"], arrays["ids_keep"], config.model.encoder.in_channels)
    rate = peak_learning_rate(config.optimizer, batch)
    calls: dict[str, timing.Call] = {}
    for form in forms:
        model = torch_model.from_params(config.model, params, config.data.image_size, form == "compiled")
        calls[f"PyTorch {form}"] = torch_model.train_call(model, config.optimizer, rate, inputs, form == "compiled")
    return calls


def measures(program: TimedStep, seconds: np.ndarray) -> Row:
    """Rates, MFU, memory and compile time of a program that was timed."""
    model, batch = program.config.model, program.batch
    useful = flops.useful_gflop(model, program.config.data.image_size, visible_tokens(program.config))
    device = jax.devices()[0].device_kind
    return {
        **timing.rate_row(seconds, batch),
        "mfu": mfu(useful * 1e9 * batch, float(np.median(seconds)), device, 1, model.encoder.dtype),
        "useful_gflop_per_image": useful,
        "memory_gib": program.memory_gib,
        "compile_s": program.compile_seconds,
    }
