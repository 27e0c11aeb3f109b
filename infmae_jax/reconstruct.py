"""Shows what a pretrained model reconstructs from the visible tokens of images.

    python -m infmae_jax.reconstruct --checkpoint=RUN --output=FILE.png IMAGE…

One row per image: input, masked input, reconstruction, visible patches pasted over it, token scores (kept ones framed).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines.commands import run_command
from data_pipelines.decode import read_image_file
from data_pipelines.errors import InputError
from data_pipelines.files import output_file
from data_pipelines.intensity import Intensity
from data_pipelines.transforms import center_crop_resize
from infmae_jax import pictures
from infmae_jax.interop import checkpoint_flags
from infmae_jax.interop.load import load
from infmae_jax.interop.trained_model import TrainedModel

VIEWS = ("crop", "stretch")


def reconstruct(
    trained: TrainedModel,
    images: Sequence[str | Path],
    output: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    view: str = "crop",
    colormap: str = "inferno",
    seed: int = 0,
) -> list[float]:
    """Writes a reconstruction panel of image files.

    Args:
      trained: the model, with its decoder.
      images: paths of image files.
      output: PNG to write.
      image_size: rows and columns of the model's input, multiples of 16; by default those of the pretraining.
      view: "crop" (evaluation view: the centre) or "stretch" (the whole image, squeezed); pixels are left as they are
        where `image_size` is that of the image.
      colormap: one of `pictures.COLORMAPS`.
      seed: of random masks.

    Returns:
      The masked reconstruction loss of each image, as it was trained.

    Raises:
      InputError: no images, one that cannot be read, a size not divisible by 16, a model without decoder.
    """
    if not images:
        raise InputError("no images given: name one or more image files after the flags")
    if Path(output).suffix.lower() != ".png":
        raise InputError(f"output {output} is not a .png file: name one that ends in .png")
    output = output_file(output, "output")
    pixels = [read_image_file(path, trained.intensity) for path in images]
    size = image_size or trained.image_size
    inputs = np.stack([center_crop_resize(image, size, stretch=view == "stretch") for image in pixels])
    result = dataclasses.replace(trained, intensity=Intensity("full_range")).reconstruct(inputs, seed)
    pictures.reconstruction_panel(
        inputs, result.ids_keep, result.pred, result.scores, trained.config.norm_pix_loss, output, colormap
    )
    return result.losses.tolist()


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run folder, or published checkpoint file.", required=True)
    flags.DEFINE_string("output", None, "Picture to write, .png; replaced if it exists.", required=True)
    flags.DEFINE_list("image_size", None, "Rows,columns of the model's input (default: the checkpoint's).")
    flags.DEFINE_enum("view", "crop", VIEWS, "How an image becomes the input: its centre, or squeezed whole.")
    flags.DEFINE_enum("colormap", "inferno", pictures.COLORMAPS, "Colours of the picture.")
    flags.DEFINE_integer("seed", 0, "Of random masks; score-based ones need none.", lower_bound=0)
    checkpoint_flags.define_architecture()
    checkpoint_flags.define_intensity()


def main(argv: Sequence[str]) -> None:
    output = output_file(flags.FLAGS.output, "output")
    trained = checkpoint_flags.with_intensity(load(flags.FLAGS.checkpoint, **checkpoint_flags.load_options()))
    losses = reconstruct(
        trained,
        argv[1:],
        output,
        image_size=checkpoint_flags.rows_columns("image_size"),
        view=flags.FLAGS.view,
        colormap=flags.FLAGS.colormap,
        seed=flags.FLAGS.seed,
    )
    print(f"{flags.FLAGS.output}: {len(losses)} images, mean masked loss {np.mean(losses):.4f}")


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
