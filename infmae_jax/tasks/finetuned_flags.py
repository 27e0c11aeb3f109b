"""The flags of every command that reads a fine-tuned model."""

from typing import Any

from absl import flags

from infmae_jax.interop.checkpoint_flags import rows_columns


def define() -> None:
    """`--checkpoint`, `--step`, `--tile`, `--overlap`, `--threshold`."""
    flags.DEFINE_string("checkpoint", None, "Folder of a fine-tuning run.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint (default: the best on validation).", lower_bound=0)
    flags.DEFINE_list("tile", None, "Rows,columns (or one number for both) by which large images are looked at.")
    flags.DEFINE_integer("overlap", None, "Pixels that neighbouring tiles share (default: a third).", lower_bound=0)
    flags.DEFINE_float("threshold", None, "Small targets: probability above which a pixel is target.")


def options() -> dict[str, Any]:
    """What the flags say, as arguments of `load_finetuned` beside the run."""
    values, tile = flags.FLAGS, rows_columns("tile", one_for_both=True)
    return {"step": values.step, "tile": tile, "overlap": values.overlap, "threshold": values.threshold}
