"""The flags of every command that reads a trained model."""

from typing import Any

from absl import flags

from data_pipelines.examples import Intensity
from data_pipelines.intensity import MAPPINGS

_ARCHITECTURE = ("heads", "decoder_heads", "norm_pix_loss", "step")


def define(architecture_only: bool = False) -> None:
    """`--step`, `--heads`, `--decoder_heads`, `--norm_pix_loss`, and those of the intensity mapping."""
    flags.DEFINE_integer("step", None, "Checkpoint of a run (default: the latest).", lower_bound=0)
    flags.DEFINE_integer("heads", None, "Attention heads of the encoder (default: as noted in the file, else 12).", 1)
    flags.DEFINE_integer("decoder_heads", None, "Attention heads of the decoder (default: as noted, else 16).", 1)
    flags.DEFINE_bool("norm_pix_loss", None, "Pixels are predicted normalised per patch (default: as noted, else no).")
    if not architecture_only:
        flags.DEFINE_enum("intensity", None, MAPPINGS, "Mapping of stored values to 8 bit (default: the run's own).")
        flags.DEFINE_float("low", None, "Its lower bound or percentile, or CLAHE's clip limit.")
        flags.DEFINE_float("high", None, "Its upper bound or percentile.")


def load_options() -> dict[str, Any]:
    """What the flags say, as arguments of `load`."""
    return {name: flags.FLAGS[name].value for name in _ARCHITECTURE}


def intensity() -> Intensity | None:
    """The mapping that was asked for, None for the run's own."""
    values = flags.FLAGS
    return Intensity(values.intensity, values.low, values.high) if values.intensity else None
