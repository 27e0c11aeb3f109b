"""Shows what a shard set holds and what the model gets to see of it.

    python -m data_pipelines.inspect SHARDS [SHARDS ...] [--output=samples.png] [--samples=6] [--score=gray_mean] ...

Prints the manifest and statistics of training samples, and writes a picture with one row a sample: the stored image
with the box of the random crop; the crop; the score of every token (dark low, bright high) with the kept ones framed;
what the encoder sees.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from data_pipelines.commands import run_command
from data_pipelines.errors import InputError
from data_pipelines.examples import decode_pixels
from data_pipelines.masking import PATCH, MaskConfig, mask_from_ids, token_grid, token_scores
from data_pipelines.pipeline import PipelineConfig, record_indices, sample_generator, train_batches
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from data_pipelines.shards import read_manifest, verify_shards
from data_pipelines.transforms import MEAN, STD, Crop, draw_crop, resize

FRAME = (255, 140, 0)
MASKED_GRAY = 60
GAP = 6
CAPTION = 16
STATISTICS_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Sample:
    """A training sample and where it comes from.

    Attributes:
      key: of its record.
      stored: (H, W) uint8, the whole image.
      box: of the crop.
      crop: uint8, as the model gets it (flipped and augmented).
      ids_keep: (K,) int32.
    """

    key: str
    stored: np.ndarray
    box: Crop
    crop: np.ndarray
    ids_keep: np.ndarray


def describe(folders: Sequence[str]) -> list[str]:
    """Lines about the manifests of shard sets.

    Raises:
      InputError: a folder is no shard set.
    """
    lines = []
    for folder, local in zip(folders, local_folders(folders), strict=True):
        manifest = read_manifest(local)
        size = sum(shard.bytes for shard in manifest.shards)
        common = sorted(manifest.sizes.items(), key=lambda item: (-item[1], item[0]))
        sizes = ", ".join(f"{name} ({count})" for name, count in common[:5])
        more = f" and {len(common) - 5} more" if len(common) > 5 else ""
        depths = ", ".join(f"{depth} bit ({count})" for depth, count in sorted(manifest.bit_depths.items()))
        lines += [
            f"{folder}",
            f"  records      {manifest.count} in {len(manifest.shards)} shards, {size / 1e6:.1f} MB",
            f"  sizes        {sizes}{more}",
            f"  depths       {depths}",
            f"  pixels       mean {manifest.mean:.3f}, std {manifest.std:.3f} (normalised by {MEAN:.3f}, {STD:.3f})",
            f"  entropy      {manifest.entropy:.2f} bit an image",
            f"  fingerprint  {manifest.fingerprint[:16]}",
        ]
    return lines


def training_samples(config: PipelineConfig) -> list[Sample]:
    """The samples of the first batch, together with the images that they were cut from."""
    with train_batches(config) as batches:
        batch = next(batches)
    reader = ExampleReader(local_folders(config.shards), config.split)
    samples = []
    for position, index in enumerate(record_indices(config, 0)):
        example = reader.first_whole(int(index))
        stored = config.intensity.apply(decode_pixels(example), example)
        # The box is what a sample's generator is asked for first.
        box = draw_crop(sample_generator(config, position), *stored.shape, config.scale, config.ratio)
        crop, ids_keep = batch["image"][position, ..., 0], batch["ids_keep"][position]
        samples.append(Sample(example.key, stored, box, crop, ids_keep))
    return samples


def describe_samples(samples: Sequence[Sample], config: PipelineConfig) -> list[str]:
    """Lines about what the model gets to see."""
    crops = np.stack([sample.crop for sample in samples])
    scores = token_scores(crops, config.mask).astype(np.float64)
    if config.mask.score == "gray_mean":
        scores /= PATCH**2  # sums to gray levels
    kept = mask_from_ids(np.stack([sample.ids_keep for sample in samples]), scores.shape[-1]) == 0
    scaled = crops / 255.0
    shares = [sample.box.height * sample.box.width / sample.stored.size for sample in samples]
    rows, columns = token_grid(*config.image_size)
    entropies = token_scores(crops, MaskConfig(score="entropy"))
    return [
        f"{len(samples)} training samples of {config.image_size[0]}x{config.image_size[1]}",
        f"  crops        {np.mean(shares):.0%} of the image on average ({min(shares):.0%} to {max(shares):.0%})",
        f"  pixels       mean {scaled.mean():.3f}, std {scaled.std():.3f}",
        f"  tokens       {int(kept[0].sum())} of {rows * columns} kept by {config.mask.score}, {config.mask.selection}",
        f"  score        mean {scores[kept].mean():.5g} of kept tokens, {scores[~kept].mean():.5g} of masked",
        f"  entropy      mean {entropies[kept].mean():.2f} bit of kept tokens, {entropies[~kept].mean():.2f} of masked",
    ]


def draw_samples(samples: Sequence[Sample], config: PipelineConfig) -> Image.Image:
    """One row a sample: stored image with box, crop, token scores with kept ones framed, visible tokens."""
    height, width = config.image_size
    stored_width = max(round(sample.stored.shape[1] * height / sample.stored.shape[0]) for sample in samples)
    stored_width = min(stored_width, 2 * width)
    left = [GAP, stored_width + 2 * GAP]
    left += [left[1] + width + GAP, left[1] + 2 * (width + GAP)]
    picture = Image.new("RGB", (left[3] + width + GAP, CAPTION + len(samples) * (height + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(picture)
    for place, title in zip(left, ("stored, box of the crop", "crop", config.mask.score, "visible"), strict=True):
        draw.text((place, 2), title, fill="black")
    for row, sample in enumerate(samples):
        top = CAPTION + row * (height + CAPTION + GAP)
        tiles = [_stored_tile(sample, (height, stored_width)), *_token_tiles(sample, config.mask)]
        for place, tile in zip(left, tiles, strict=True):
            picture.paste(tile, (place, top))
        draw.text(
            (GAP, top + height + 1), f"{sample.key}  {sample.stored.shape[1]}x{sample.stored.shape[0]}", fill="black"
        )
    return picture


def _stored_tile(sample: Sample, size: tuple[int, int]) -> Image.Image:
    height, width = sample.stored.shape
    factor = min(size[0] / height, size[1] / width)
    scaled = resize(sample.stored, (max(1, round(height * factor)), max(1, round(width * factor))))
    tile = Image.fromarray(scaled).convert("RGB")
    box = sample.box
    corners = [box.left, box.top, box.left + box.width, box.top + box.height]
    edges = [round(edge * factor) for edge in corners]
    ImageDraw.Draw(tile).rectangle((edges[0], edges[1], edges[2] - 1, edges[3] - 1), outline=FRAME, width=2)
    return tile


def _token_tiles(sample: Sample, mask: MaskConfig) -> list[Image.Image]:
    """Crop, scores with kept tokens framed, visible tokens."""
    rows, columns = token_grid(*sample.crop.shape)
    scores = token_scores(sample.crop, mask).astype(np.float64).reshape(rows, columns)
    spread = scores.max() - scores.min()
    levels = (255 * (scores - scores.min()) / (spread or 1.0)).astype(np.uint8)
    heat = Image.fromarray(np.kron(levels, np.ones((PATCH, PATCH), np.uint8))).convert("RGB")
    draw = ImageDraw.Draw(heat)
    for token in sample.ids_keep.tolist():
        top, left = token // columns * PATCH, token % columns * PATCH
        draw.rectangle((left, top, left + PATCH - 1, top + PATCH - 1), outline=FRAME)
    masked = mask_from_ids(sample.ids_keep, rows * columns).reshape(rows, columns)
    hidden = np.kron(masked, np.ones((PATCH, PATCH))) > 0
    visible = np.where(hidden, np.uint8(MASKED_GRAY), sample.crop)
    return [Image.fromarray(sample.crop).convert("RGB"), heat, Image.fromarray(visible).convert("RGB")]


def inspect(config: PipelineConfig, output: str | os.PathLike, samples: int, verify: bool = False) -> list[str]:
    """Writes the picture and returns the lines to print.

    Args:
      config: what to read and how; its batch size is not used.
      output: picture file, replaced if it exists.
      samples: rows of the picture.
      verify: read all shards and compare them with the manifest's digests.

    Raises:
      InputError: unusable shards, a shard that differs from its digest, or a picture that cannot be written.
    """
    output = Path(output)
    if output.suffix != ".png" or not output.parent.is_dir():
        raise InputError(f"--output={output} must be a .png file in a folder that exists")
    if samples < 1:
        raise InputError(f"--samples={samples} must be at least 1")
    lines = describe(config.shards)
    if verify:
        for folder in local_folders(config.shards):
            verify_shards(folder)
        lines.append("all shards equal their digests")
    config = dataclasses.replace(config, batch_size=max(samples, STATISTICS_SAMPLES), workers=0)
    drawn = training_samples(config)
    lines += describe_samples(drawn, config)
    beside = output.with_name(output.name + ".partial")
    draw_samples(drawn[:samples], config).save(beside, "PNG")
    beside.replace(output)
    return [*lines, f"picture of {samples} samples: {output}"]


def _define_flags() -> None:
    flags.DEFINE_string("output", "samples.png", "Picture to write.")
    flags.DEFINE_integer("samples", 6, "Rows of the picture.")
    flags.DEFINE_integer("image_size", 224, "Side of a crop, a multiple of 16.")
    flags.DEFINE_integer("seed", 0, "Of order and crops.")
    flags.DEFINE_enum("score", "gray_mean", ("gray_mean", "variance", "entropy"), "Score of tokens.")
    flags.DEFINE_enum("selection", "stride", ("stride", "random", "top_k"), "Which tokens stay visible.")
    flags.DEFINE_integer("stride", 4, "One in so many tokens stays visible.")
    flags.DEFINE_bool("verify", False, "Read everything and compare it with the manifest's digests.")


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise InputError("name a shard set: python -m data_pipelines.inspect SHARDS")
    values = flags.FLAGS
    mask = MaskConfig(score=values.score, selection=values.selection, stride=values.stride)
    size = (values.image_size, values.image_size)
    config = PipelineConfig(tuple(argv[1:]), image_size=size, seed=values.seed, mask=mask)
    print("\n".join(inspect(config, values.output, values.samples, values.verify)))


if __name__ == "__main__":
    _define_flags()
    run_command(main)
