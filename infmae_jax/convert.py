"""Converts trained models: published PyTorch checkpoints, safetensors, run folders, StableHLO.

A published checkpoint becomes a run folder, and back; a run becomes a function that needs no package but JAX:

    python -m infmae_jax.convert --from=torch --input=checkpoint.pth --output=RUN
    python -m infmae_jax.convert --from=run --input=RUN --to=torch --output=checkpoint.pth
    python -m infmae_jax.convert --from=run --input=RUN --to=jax-export --output=features.stablehlo

The output must not exist; it appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.masking import token_grid
from infmae_jax.interop import formats
from infmae_jax.interop.published import Checkpoint

FLAGS = flags.FLAGS


def convert(
    source: str,
    target: str,
    input_path: str,
    output_path: str,
    *,
    step: int | None = None,
    image_size: tuple[int, int] | None = None,
    **architecture,
) -> Checkpoint:
    """Reads a model in one format and writes it in another.

    Args:
      source, target: of `formats.READABLE` and `formats.WRITABLE`.
      input_path, output_path: files or run folders; the output must not exist and appears whole or not at all.
      step: checkpoint of a run; the latest by default.
      image_size: rows and columns that "jax-export" takes; those of the checkpoint by default.
      **architecture: see `formats.read`.

    Returns:
      What was read.

    Raises:
      InputError: the input cannot be read as `source` or the output not be written as `target`.
    """
    if Path(output_path).exists():
        raise InputError(f"{output_path} already exists; remove it or choose another --output")
    if image_size is not None:
        token_grid(*image_size)
    checkpoint = formats.read(input_path, source, step=step, **architecture)
    origin = {"format": source, "path": str(input_path)}
    formats.write(output_path, target, checkpoint, image_size or checkpoint.image_size, origin)
    return checkpoint


def _image_size(values: list[str] | None) -> tuple[int, int] | None:
    if values is None:
        return None
    try:
        rows, columns = (int(value) for value in values)
    except ValueError as error:
        raise InputError(f"--image_size={','.join(values)} must be two numbers: rows,columns") from error
    return rows, columns


def _define_flags() -> None:
    flags.DEFINE_enum("from", None, formats.READABLE, "Format of --input.", required=True)
    flags.DEFINE_enum("to", "run", formats.WRITABLE, "Format of --output.")
    flags.DEFINE_string("input", None, "Checkpoint file, or run folder.", required=True)
    flags.DEFINE_string("output", None, "File (for --to=run: folder) to make; must not exist.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint of a run to take (default: the latest).", lower_bound=0)
    flags.DEFINE_integer("heads", None, "Attention heads of the encoder (default: as noted in the file, else 12).", 1)
    flags.DEFINE_integer("decoder_heads", None, "Attention heads of the decoder (default: as noted, else 16).", 1)
    flags.DEFINE_bool("norm_pix_loss", None, "Pixels are predicted normalised per patch (default: as noted, else no).")
    flags.DEFINE_list("image_size", None, "Rows,columns that --to=jax-export takes (default: the checkpoint's).")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}; use --input and --output")
    source, target = FLAGS["from"].value, FLAGS.to
    architecture = {name: FLAGS[name].value for name in ("heads", "decoder_heads", "norm_pix_loss")}
    checkpoint = convert(
        source,
        target,
        FLAGS.input,
        FLAGS.output,
        step=FLAGS.step,
        image_size=_image_size(FLAGS.image_size),
        **architecture,
    )
    model = checkpoint.model
    count = sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params))
    print(
        f"{FLAGS.output}: {model.encoder} encoder, {count:,} parameters, widths {model.widths}, depths {model.depths}, "
        f"{model.heads} heads; decoder {model.decoder_width} wide, {model.decoder_depth} deep, {model.decoder_heads} "
        f"heads; images {checkpoint.image_size[0]}x{checkpoint.image_size[1]}, mask score {checkpoint.mask.score}"
    )


if __name__ == "__main__":
    _define_flags()
    run_command(main)
