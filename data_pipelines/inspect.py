"""Shows what a shard set holds and what the model gets to see of it.

    python -m data_pipelines.inspect SHARDS [SHARDS ...] [--split=train] [--output=samples.png] [--samples=6] ...

Prints the manifest, the share of each class and statistics of training samples, and draws one row per sample: the
stored image with its labels in colour and the box of the random crop; the crop; the score of every token (dark low,
bright high) with the kept ones framed; what the encoder sees.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from data_pipelines.commands import printable, run_command
from data_pipelines.errors import InputError, refusing
from data_pipelines.examples import IGNORE, CorruptExample, Example, decode_mask, decode_pixels
from data_pipelines.files import atomic_write, local_path, writing
from data_pipelines.masking import PATCH, MaskConfig, mask_from_ids, token_grid, token_scores
from data_pipelines.pipeline import PipelineConfig, batch_examples, sample_generator, train_batches
from data_pipelines.reader import ExampleReader
from data_pipelines.remote import local_folders
from data_pipelines.shards import Manifest, read_manifest, verify_shards
from data_pipelines.sheets import class_colours, draw_sheet, spread, veiled
from data_pipelines.transforms import MEAN, STD, Crop, draw_crop

FRAME = (255, 140, 0)
MASKED_GRAY = 60
STATISTICS_SAMPLES = 64
LABEL_SAMPLES = 500  # read of each split for the shares of classes


@dataclasses.dataclass(frozen=True)
class Sample:
    """A training sample and where it comes from.

    Attributes:
      example: what it was cut from.
      stored: (H, W) uint8, the whole image.
      box: of the crop.
      crop: uint8, as the model gets it (flipped and augmented).
      ids_keep: (K,) int32.
    """

    example: Example
    stored: np.ndarray
    box: Crop
    crop: np.ndarray
    ids_keep: np.ndarray


def describe(folder: str, local: str | os.PathLike) -> list[str]:
    """Lines about a shard set, of which `local` is a local copy."""
    manifest = read_manifest(local)
    size = sum(shard.bytes for shard in manifest.shards)
    common = [f"{name} ({count})" for name, count in Counter(manifest.sizes).most_common(5)]
    depths = ", ".join(f"{depth} bit ({count})" for depth, count in sorted(manifest.bit_depths.items()))
    more = len(manifest.sizes) - len(common)
    return [
        f"{folder}",
        f"  records      {manifest.count} in {len(manifest.shards)} shards, {size / 1e6:.1f} MB",
        f"  splits       {', '.join(f'{name} ({split.count})' for name, split in manifest.splits.items())}",
        f"  sizes        {', '.join(common)}{f' and {more} more' if more else ''}",
        f"  depths       {depths}",
        f"  pixels       mean {manifest.mean:.3f}, std {manifest.std:.3f} (normalised by {MEAN:.3f}, {STD:.3f})",
        f"  entropy      {manifest.entropy:.2f} bit per image",
        f"  fingerprint  {manifest.fingerprint[:16]}",
        *(line for split in manifest.splits if manifest.classes for line in _describe_labels(manifest, local, split)),
    ]


def _describe_labels(manifest: Manifest, local: str | os.PathLike, split: str) -> list[str]:
    """Lines about the share of each class in a split, of at most `LABEL_SAMPLES` examples evenly over it."""
    counts = {name: Counter() for name in manifest.classes}
    reader = ExampleReader([local], split)
    chosen = spread(range(len(reader)), LABEL_SAMPLES)
    for index in chosen:
        try:
            example = reader[index]
        except CorruptExample:
            continue
        found = dict(example.labels)
        if example.mask is not None:
            found["mask"] = decode_mask(example)
        if example.objects is not None:
            found["objects"] = example.objects.classes
        for name in found.keys() & counts.keys():
            values, numbers = np.unique(found[name], return_counts=True)
            counts[name].update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    lines = [f"  {split}: labels of {len(chosen)} of {len(reader)} images"]
    for name, names in manifest.classes.items():
        total, unit = counts[name].total(), {"mask": "pixels", "objects": "boxes"}.get(name, "images")
        shown = [*enumerate(names), (IGNORE, "ignored")] if name == "mask" else enumerate(names)
        listed = ", ".join(f"{text} {counts[name][number] / max(total, 1):.1%}" for number, text in shown)
        lines.append(f"    {name}: {listed} of {total} {unit}")
    return lines


def training_samples(config: PipelineConfig) -> list[Sample]:
    """The samples of the first batch, together with the images that they were cut from."""
    with train_batches(config) as batches:
        batch = next(batches)
    samples = []
    for position, example in enumerate(batch_examples(config, 0)):
        stored = config.intensity.apply(decode_pixels(example), example.attributes)
        # The box is what a sample's generator is asked for first.
        box = draw_crop(sample_generator(config, position), *stored.shape, config.scale, config.ratio)
        samples.append(Sample(example, stored, box, batch["image"][position, ..., 0], batch["ids_keep"][position]))
    return samples


def describe_samples(samples: Sequence[Sample], config: PipelineConfig) -> list[str]:
    """Lines about what the model gets to see."""
    crops = np.stack([sample.crop for sample in samples])
    scores = token_scores(crops, config.mask).astype(np.float64)
    if config.mask.score == "gray_mean":
        scores /= PATCH**2  # sums to gray levels
    kept = mask_from_ids(np.stack([sample.ids_keep for sample in samples]), scores.shape[-1]) == 0
    shares = [sample.box.height * sample.box.width / sample.stored.size for sample in samples]
    tokens = f"{int(kept[0].sum())} of {kept.shape[1]} kept by {config.mask.score}, {config.mask.selection}"
    return [
        f"{len(samples)} training samples of {config.image_size[0]}x{config.image_size[1]}",
        f"  crops        {np.mean(shares):.0%} of the image on average ({min(shares):.0%} to {max(shares):.0%})",
        f"  pixels       mean {crops.mean() / 255:.3f}, std {crops.std() / 255:.3f}",
        f"  tokens       {tokens}",
        f"  score        mean {scores[kept].mean():.5g} of kept tokens, {scores[~kept].mean():.5g} of masked",
    ]


def draw_samples(samples: Sequence[Sample], config: PipelineConfig) -> Image.Image:
    """One row per sample: stored image with labels and box, crop, token scores with the kept framed, visible tokens."""
    rows = []
    for sample in samples:
        height, width = sample.stored.shape
        stored = _stored_tile(sample, (config.image_size[0], 2 * config.image_size[1]))
        tokens = [(tile, "") for tile in _token_tiles(sample, config.mask)]
        rows.append([(stored, f"{sample.example.key}  {width}x{height}"), *tokens])
    return draw_sheet(("stored, box of the crop", "crop", config.mask.score, "visible"), rows)


def _stored_tile(sample: Sample, size: tuple[int, int]) -> Image.Image:
    """The whole image: class mask as a veil, boxes in the colours of their classes, the crop's box."""
    tile = Image.fromarray(sample.stored).convert("RGB")
    if sample.example.mask is not None:
        tile = veiled(sample.stored, decode_mask(sample.example))
    height, width = sample.stored.shape
    factor = min(size[0] / height, size[1] / width)
    tile = tile.resize((max(1, round(width * factor)), max(1, round(height * factor))))
    draw = ImageDraw.Draw(tile)
    if (objects := sample.example.objects) is not None:
        colours = class_colours(256)[1:].tolist()
        for box, number in zip(objects.boxes, objects.classes.tolist(), strict=True):
            _frame(draw, box, factor, tuple(colours[number % len(colours)]), 1)
    box = sample.box
    _frame(draw, (box.left, box.top, box.left + box.width, box.top + box.height), factor, FRAME, 2)
    return tile


def _frame(draw: ImageDraw.ImageDraw, box: Sequence[float], factor: float, colour: tuple, line: int) -> None:
    x0, y0, x1, y1 = (round(float(edge) * factor) for edge in box)
    draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=line)


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
    output = local_path(output, "output")
    if not output.endswith(".png") or not os.path.isdir(os.path.dirname(output)):
        raise InputError(f"--output={output} must be a .png file in a folder that exists")
    if samples < 1:
        raise InputError(f"--samples={samples} must be at least 1")
    lines = []
    with refusing("the samples cannot be shown", "prepare the shards again", CorruptExample):
        for folder, local in zip(config.shards, local_folders(config.shards), strict=True):
            lines += describe(folder, local)
            if verify:
                verify_shards(local)
                lines.append("  all shards equal their digests")
        config = dataclasses.replace(config, batch_size=max(samples, STATISTICS_SAMPLES), workers=0)
        drawn = training_samples(config)
        lines += describe_samples(drawn, config)
        with writing(output), atomic_write(output) as partial:
            draw_samples(drawn[:samples], config).save(partial, "PNG")
    return [*map(printable, lines), f"picture of {samples} samples: {printable(output)}"]


def _define_flags() -> None:
    flags.DEFINE_string("output", "samples.png", "Picture to write.")
    flags.DEFINE_string("split", "train", "Of the samples.")
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
    shards = tuple(map(os.path.expanduser, argv[1:]))
    config = PipelineConfig(shards, split=values.split, image_size=size, seed=values.seed, mask=mask)
    print("\n".join(inspect(config, values.output, values.samples, values.verify)))


if __name__ == "__main__":
    run_command(main, define_flags=_define_flags)
