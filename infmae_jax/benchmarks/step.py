"""The training step: images a second, MFU, memory and compile time; against PyTorch in the same run on request."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from infmae_jax.benchmarks import flops, timing
from infmae_jax.benchmarks.report import NEEDS_ACCELERATOR, Row, on_accelerator, report
from infmae_jax.benchmarks.training import TrainingProgram, learning_rate, synthetic_batch, visible_tokens
from infmae_jax.models.config import variant
from infmae_jax.training.config import PretrainConfig
from infmae_jax.training.hardware import mfu

TORCH_FORMS = ("eager", "compiled")
# Of the first losses of two frameworks on the same weights and batch, relative.
_SAME_LOSS = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What `step` is measured over: every combination of these.

    Attributes:
      variants: named model variants; empty: the config's model.
      batch_sizes, dtypes, remat, visible_only: values to try.
    """

    batch_sizes: Sequence[int]
    variants: Sequence[str] = ()
    dtypes: Sequence[str] = ("float32",)
    remat: Sequence[bool] = (False,)
    visible_only: Sequence[bool] = (True, False)

    def groups(self, config: PretrainConfig) -> Iterator[dict[str, tuple[PretrainConfig, int]]]:
        """Row name -> config and batch size, of rows that differ in `visible_only` alone."""
        for name, batch, dtype, remat in itertools.product(
            self.variants or ("",), self.batch_sizes, self.dtypes, self.remat
        ):
            model = variant(name) if name else config.model
            model = model.replace(dtype=dtype, remat=remat)
            ways = {way: (flops.on_visible if way else flops.as_published)(model) for way in self.visible_only}
            label = f"{name or 'model'}, batch {batch}, {dtype}{', remat' if remat else ''}, "
            yield {
                label + (flops.VISIBLE_ONLY if way else flops.PUBLISHED): (dataclasses.replace(config, model=m), batch)
                for way, m in ways.items()
            }


def step(config: PretrainConfig, grid: Grid, rounds: int) -> dict[str, Any]:
    """Our training step over a grid; on visible patches and as published in turns."""
    rows = []
    for group in grid.groups(config):
        programs = {name: TrainingProgram(*row) for name, row in group.items()}
        for program in programs.values():
            program.start()
        seconds = timing.take_turns(programs, rounds)
        for name, program in programs.items():
            program.stop()
            faster = {"faster_than_published_way": timing.ratio(seconds[list(group)[-1]], seconds[name])}
            rows.append({"name": name, **measures(program, seconds[name]), **(faster if len(group) > 1 else {})})
    return report("step", _settings(config, rounds), rows, [_MFU_NOTE])


def step_against_torch(config: PretrainConfig, batch: int, forms: Sequence[str], rounds: int) -> dict[str, Any]:
    """Ours and PyTorch's step in turns, from the same weights and on the same batch.

    Args:
      forms: of `TORCH_FORMS`: "eager", attention written out; "compiled", torch.compile with fused attention and AdamW.

    Raises:
      InputError: PyTorch is not installed.
      ArithmeticError: the first losses differ by more than rounding.
    """
    from infmae_jax.benchmarks import torch_model

    program = TrainingProgram(config, batch)
    program.start()
    params = jax.device_get(program.state.params)
    calls: dict[str, timing.Call] = {"ours": program}
    inputs = torch_model.batch(**_torch_names(synthetic_batch(config, batch)), channels=config.model.encoder.in_channels)
    for form in forms:
        model = torch_model.from_params(config.model, params, config.data.image_size, form == "compiled")
        update = torch_model.make_train_step(
            model, config.optimizer, lambda _: learning_rate(config, batch), form == "compiled"
        )
        calls[f"PyTorch {form}"] = _torch_call(update, inputs)
    losses: dict[str, float] = {}

    def noting(name: str, call: timing.Call) -> timing.Call:
        """The call, which notes its first loss: that of the weights that all started from."""
        return lambda times: losses.setdefault(name, call(times))

    seconds = timing.take_turns({name: noting(name, call) for name, call in calls.items()}, rounds)
    for name, loss in losses.items():
        if not np.isclose(loss, losses["ours"], rtol=_SAME_LOSS[config.model.encoder.dtype], atol=0):
            raise ArithmeticError(f"{name}: first loss {loss}, ours {losses['ours']}: not the same computation")
    rows: list[Row] = []
    for name in calls:
        row = {"name": name, "first_loss": losses[name]}
        if name == "ours":
            rows.append(row | measures(program, seconds[name]))
        else:
            faster = timing.ratio(seconds[name], seconds["ours"])
            rows.append(row | timing.rate_row(seconds[name], batch) | {"ours_is_faster_by": faster})
    settings = _settings(config, rounds) | {
        "batch": batch, "dtype": config.model.encoder.dtype, "torch": torch_model.torch.__version__,
        "torch_threads": torch_model.torch.get_num_threads(),
    }  # fmt: skip
    notes = [] if on_accelerator() else [f"GPU rows: {NEEDS_ACCELERATOR}"]
    return report("step --torch", settings, rows, [_MFU_NOTE, *notes])


_MFU_NOTE = (
    "mfu: useful operations (on visible patches, by hand count) over time and the device's peak; '-' where the peak "
    "is unknown, as of CPUs. memory_gib: state, batch and temporaries of the compiled program."
)


def measures(program: TrainingProgram, seconds: np.ndarray) -> Row:
    """Rates, MFU, memory and compile time of a program that was timed."""
    config, batch = program.config, program.batch
    useful = flops.useful_gflop(config.model, config.data.image_size, visible_tokens(config))
    share = mfu(
        useful * 1e9 * batch, float(np.median(seconds)), jax.devices()[0].device_kind, 1, config.model.encoder.dtype
    )
    return {
        **timing.rate_row(seconds, batch),
        "mfu": share,
        "useful_gflop_per_image": useful,
        "memory_gib": program.memory_gib,
        "compile_s": program.compile_seconds,
    }


def _torch_names(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"images": batch["image"], "ids_keep": batch["ids_keep"]}


def _torch_call(update: Callable[..., Any], inputs: tuple[Any, ...]) -> timing.Call:
    def call(times: int) -> float:
        for _ in range(times):
            loss = update(*inputs)
        return loss.item()  # which waits for the device

    return call


def _settings(config: PretrainConfig, rounds: int) -> dict[str, Any]:
    return {"image_size": list(config.data.image_size), "visible_tokens": visible_tokens(config), "rounds": rounds}
