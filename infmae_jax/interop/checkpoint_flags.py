"""The flags of every command that reads a trained model."""

import dataclasses
from typing import Any

from absl import flags

from data_pipelines.errors import InputError
from data_pipelines.intensity import MAPPINGS, Intensity
from infmae_jax.interop.trained_model import TrainedModel

_ARCHITECTURE = ("heads", "decoder_heads", "norm_pix_loss", "step")


def define_architecture(step: str = "the latest") -> None:
    """`--step` (by default what `step` says), `--heads`, `--decoder_heads`, `--norm_pix_loss`."""
    flags.DEFINE_integer("step", None, f"Checkpoint of a run (default: {step}).", lower_bound=0)
    flags.DEFINE_integer("heads", None, "Attention heads of the encoder (default: as noted in the file, else 12).", 1)
    flags.DEFINE_integer("decoder_heads", None, "Attention heads of the decoder (default: as noted, else 16).", 1)
    flags.DEFINE_bool("norm_pix_loss", None, "Pixels are predicted normalised per patch (default: as noted, else no).")


def define_intensity() -> None:
    """`--intensity`, `--low`, `--high`."""
    flags.DEFINE_enum("intensity", None, MAPPINGS, "Mapping of stored values to 8 bit (default: the run's own).")
    flags.DEFINE_float("low", None, "Its lower bound or percentile.")
    flags.DEFINE_float("high", None, "Its upper bound or percentile.")


def load_options() -> dict[str, Any]:
    """What the flags say, as arguments of `load`."""
    return {name: flags.FLAGS[name].value for name in _ARCHITECTURE}


def with_intensity(trained: TrainedModel) -> TrainedModel:
    """The model with the mapping that was asked for, which is printed where it is not that of its run."""
    values = flags.FLAGS
    if not values.intensity:
        if (values.low, values.high) != (None, None):
            raise InputError("--low and --high belong to --intensity: give it, or leave them out")
        return trained
    asked = Intensity(values.intensity, values.low, values.high)
    if asked != trained.intensity:
        print(f"{trained.name}: images by {asked}, not by the run's own {trained.intensity}")
    return dataclasses.replace(trained, intensity=asked)


def rows_columns(name: str, one_for_both: bool = False) -> tuple[int, int] | None:
    """`--NAME=rows,columns`, or one number for both; None where it is left out."""
    values = flags.FLAGS[name].value
    if values is None:
        return None
    if len(values) not in (2 - one_for_both, 2) or not all(value.strip().isdigit() for value in values):
        also = ", or one number for both" if one_for_both else ""
        raise InputError(f"--{name}={','.join(values)} is not rows,columns: write, for example, 224,320{also}")
    return int(values[0]), int(values[-1])
