"""Shows what a pretrained model reconstructs from the visible tokens of images.

    python -m infmae_jax.reconstruct --checkpoint=RUN --output=FILE.png IMAGE…

One row an image: input, masked input, reconstruction, visible patches pasted over it, token scores (kept ones framed).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from data_pipelines import masking
from data_pipelines.augment import center_crop_resize
from data_pipelines.commands import run_command
from data_pipelines.decode import read_image_file
from data_pipelines.errors import InputError
from infmae_jax import pictures
from infmae_jax.interop import formats
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE
from infmae_jax.models.patches import PATCH, normalize

VIEWS = ("crop", "stretch", "original")


def reconstruct(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    output: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    view: str = "crop",
    colormap: str = "inferno",
    step: int | None = None,
    seed: int = 0,
) -> list[float]:
    """Writes a reconstruction panel of image files.

    Args:
      checkpoint: a run folder, or a published checkpoint file.
      images: paths of image files.
      output: PNG to write.
      image_size: rows and columns of the model's input, multiples of 16; by default those of the pretraining.
      view: "crop" (evaluation view: the centre), "stretch" (the whole image, squeezed), or "original" (as it is: all
        images of one size, `image_size` left out).
      colormap: one of `pictures.COLORMAPS`.
      step: checkpoint of a run; the latest by default.
      seed: of random masks.

    Returns:
      The masked reconstruction loss of each image, as it was trained.

    Raises:
      InputError: no images, one that cannot be read, a size not divisible by 16, no usable checkpoint.
    """
    if not images:
        raise InputError("no images given: name one or more image files after the flags")
    if Path(output).suffix.lower() != ".png":
        raise InputError(f"output {output} is not a .png file: name one that ends in .png")
    pixels = [read_image_file(path) for path in images]
    restored = formats.read(checkpoint, formats.detect(checkpoint), step=step)
    if view == "original":
        inputs = _of_one_size(pixels, images, image_size)
    else:
        size = image_size or restored.image_size
        inputs = np.stack([center_crop_resize(image, size, stretch=view == "stretch") for image in pixels])
    scores = masking.token_scores(inputs, restored.mask)
    ids_keep = masking.select_visible(scores, restored.mask, np.random.default_rng(seed))
    params = jax.device_put(restored.params)
    # One at a time: the memory needed does not grow with the number of images.
    results = [
        _predict(restored.model, params, image[None, ..., None], ids[None])
        for image, ids in zip(inputs, ids_keep, strict=True)
    ]
    pred = np.concatenate([np.asarray(pred, np.float32) for pred, _ in results])
    pictures.reconstruction_panel(
        inputs, ids_keep, pred, scores, restored.model.norm_pix_loss, output, colormap, restored.mask.patch
    )
    return [float(loss) for _, loss in results]


@functools.partial(jax.jit, static_argnums=0)
def _predict(config: InfMAEConfig, params: dict, image: jax.Array, ids_keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1,H,W,1) uint8 and (1,K) -> what the model predicts (1,N,P), and its loss ()."""
    out = InfMAE(config).apply({"params": params}, normalize(image), ids_keep)
    return out.pred, out.loss


def _of_one_size(
    pixels: Sequence[np.ndarray], names: Sequence[str | Path], image_size: tuple[int, int] | None
) -> np.ndarray:
    if image_size is not None:
        raise InputError("--image_size does not go with --view=original: leave one of them out")
    for image, name in zip(pixels, names, strict=True):
        height, width = image.shape
        if height % PATCH or width % PATCH:
            raise InputError(f"{name} is {height}x{width}, not divisible by {PATCH}: use --view=crop or --view=stretch")
        if image.shape != pixels[0].shape:
            raise InputError(f"{name} is {height}x{width}, {names[0]} is not: one size with --view=original, or crop")
    return np.stack(pixels)


def _parse_size(values: Sequence[str] | None) -> tuple[int, int] | None:
    if not values:
        return None
    if len(values) != 2 or not all(value.strip().isdigit() for value in values):
        raise InputError(f"--image_size={','.join(values)} is not rows,columns: write, for example, 224,320")
    return int(values[0]), int(values[1])


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run folder, or published checkpoint file.", required=True)
    flags.DEFINE_string("output", None, "Picture to write, .png; replaced if it exists.", required=True)
    flags.DEFINE_list("image_size", None, "Rows,columns of the model's input (default: the checkpoint's).")
    flags.DEFINE_enum(
        "view", "crop", VIEWS, "How an image becomes the input: its centre, squeezed whole, or pixel by pixel as it is."
    )
    flags.DEFINE_enum("colormap", "inferno", pictures.COLORMAPS, "Colours of the picture.")
    flags.DEFINE_integer("step", None, "Checkpoint of a run (default: the latest).", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of random masks; score-based ones need none.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    losses = reconstruct(
        flags.FLAGS.checkpoint,
        argv[1:],
        flags.FLAGS.output,
        image_size=_parse_size(flags.FLAGS.image_size),
        view=flags.FLAGS.view,
        colormap=flags.FLAGS.colormap,
        step=flags.FLAGS.step,
        seed=flags.FLAGS.seed,
    )
    print(f"{flags.FLAGS.output}: {len(losses)} images, mean masked loss {np.mean(losses):.4f}")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
