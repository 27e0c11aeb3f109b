"""Converts trained models: published PyTorch checkpoints, safetensors, run folders, StableHLO.

A published checkpoint becomes a run folder, and back; a run becomes a function that needs no package but JAX:

    python -m infmae_jax.convert --from=torch --input=checkpoint.pth --output=RUN
    python -m infmae_jax.convert --from=run --input=RUN --to=safetensors --output=checkpoint.safetensors
    python -m infmae_jax.convert --from=run --input=RUN --to=jax-export --output=features.stablehlo

The output must not exist; it appears whole or not at all, and names no folder, host or user.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from data_pipelines.commands import flags_only, run_command
from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, writing
from data_pipelines.masking import token_grid
from infmae_jax.evaluation.windows import MULTIPLE
from infmae_jax.interop import checkpoint_flags, load, stablehlo
from infmae_jax.interop.trained_model import TrainedModel
from infmae_jax.tasks.finetuned import is_finetuned, load_finetuned

FLAGS = flags.FLAGS


def convert(
    source: str,
    target: str,
    input_path: str,
    output_path: str,
    *,
    image_size: tuple[int, int] | None = None,
    **options,
) -> TrainedModel:
    """Reads a model in one format and writes it in another.

    Args:
      source, target: of `load.READABLE` and `load.WRITABLE`.
      input_path, output_path: files or run folders; the output must not exist and appears whole or not at all.
      image_size: rows and columns that "jax-export" takes; those of the checkpoint by default.
      **options: `step`, `heads`, `decoder_heads`, `norm_pix_loss`, see `load.load`.

    Returns:
      What was read.

    Raises:
      InputError: the input cannot be read as `source` or the output not be written as `target`.
    """
    load.free_output(output_path)
    if image_size is not None:
        token_grid(*image_size)
    trained = load.load(input_path, source=source, **options)
    origin = {"format": source, "name": Path(input_path).name}
    load.write(output_path, target, trained, image_size or trained.image_size, origin)
    return trained


def export_finetuned(run: str, output: str, image_size: tuple[int, int] | None = None, step: int | None = None) -> str:
    """Writes what a fine-tuned model computes as a function that needs no package but JAX.

    The result is read with `jax.export.deserialize(data).call(images)`: images (1,H,W) uint8 of the given size, mapped
    to 8 bit but not normalised; it returns what the model's `compute` does, class numbers or probabilities.

    Args:
      run: folder of a fine-tuning run.
      output: file; must not exist, and appears whole or not at all.
      image_size: (H, W), multiples of 32; that of its training crops by default.
      step: checkpoint; the best one on validation by default.

    Returns:
      A line for people.

    Raises:
      InputError: not such a run, an impossible size, or an output that is in the way.
    """
    path = load.free_output(output)
    tuned = load_finetuned(run, step)
    size = image_size or tuned.model.config.data.image_size
    if any(side % MULTIPLE or side < MULTIPLE for side in size):
        raise InputError(f"--image_size={size[0]},{size[1]} must be rows,columns, multiples of {MULTIPLE}")
    images = jax.ShapeDtypeStruct((1, *size), jnp.uint8)
    data = stablehlo.serialised(lambda pixels: tuned.model.compute(tuned.params, pixels), images)
    with writing(path), atomic_write(path) as partial:
        partial.write_bytes(data)
    what = f"{tuned.model.config.task} of {', '.join(tuned.model.classes)}"
    return f"{output}: images (1,{size[0]},{size[1]}) uint8 -> {what}, step {tuned.step}"


def _define_flags() -> None:
    flags.DEFINE_enum("from", None, load.READABLE, "Format of --input.", required=True)
    flags.DEFINE_enum("to", "run", load.WRITABLE, "Format of --output.")
    flags.DEFINE_string("input", None, "Checkpoint file, or run folder.", required=True)
    flags.DEFINE_string("output", None, "File (for --to=run: folder) to make; must not exist.", required=True)
    flags.DEFINE_list("image_size", None, "Rows,columns that --to=jax-export takes (default: the checkpoint's).")
    checkpoint_flags.define_architecture("the latest; for --to=jax-export of a fine-tuned run the best on validation")


def main(argv: Sequence[str]) -> None:
    flags_only(argv)
    if (FLAGS["from"].value, FLAGS.to) == ("run", "jax-export") and is_finetuned(FLAGS.input):
        print(export_finetuned(FLAGS.input, FLAGS.output, checkpoint_flags.rows_columns("image_size"), FLAGS.step))
        return
    trained = convert(
        FLAGS["from"].value,
        FLAGS.to,
        FLAGS.input,
        FLAGS.output,
        image_size=checkpoint_flags.rows_columns("image_size"),
        **checkpoint_flags.load_options(),
    )
    encoder, decoder = trained.config.encoder, trained.config.decoder
    described = f"decoder {decoder.width} wide, {decoder.depth} deep, {decoder.heads} heads"
    count = sum(leaf.size for leaf in jax.tree.leaves(dict(trained.params)))
    print(
        f"{FLAGS.output}: {encoder.kind} encoder, {count:,} parameters, widths {encoder.widths}, depths "
        f"{encoder.depths}, {encoder.heads} heads; {described if 'decoder' in trained.params else 'no decoder'}; "
        f"images {trained.image_size[0]}x{trained.image_size[1]}, mask score {trained.mask.score}"
    )


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
