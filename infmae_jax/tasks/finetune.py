"""What all fine-tuning tasks share: an encoder from a checkpoint, layer-wise learning rates, labelled shards.

The recipe is the one that MCMAE's transfer uses (AdamW, weight decay 0.05, layer decay 0.75, drop path, polynomial
decay of the learning rate), with the encoder's own pixel normalisation.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from data_pipelines import pipeline
from data_pipelines.errors import InputError
from data_pipelines.files import local_path
from data_pipelines.intensity import Intensity
from data_pipelines.pipeline import PipelineConfig
from data_pipelines.remote import local_folders
from data_pipelines.shards import Manifest, read_manifest
from data_pipelines.synthetic import write_shards
from data_pipelines.transforms import InfraredAugment
from data_pipelines.views import LabelledView
from infmae_jax.evaluation.windows import Windows
from infmae_jax.interop.load import ARCHITECTURE, RANDOM, load_encoder
from infmae_jax.interop.trained_model import DEFAULT_SIZE, TrainedModel
from infmae_jax.models.config import EncoderConfig, variant
from infmae_jax.models.patches import token_grid
from infmae_jax.training.config import Count, Duration, OptimizerConfig, RunConfig

AUTO = "auto"
_FULL_EPOCHS, _FULL_IMAGES = 100, 1000  # the usual hundred epochs belong to data sets of a thousand images
_FEWEST_EPOCHS, _MOST_EPOCHS = 20, 400
Config = TypeVar("Config", bound="FineTuneConfig")


@dataclasses.dataclass(frozen=True)
class LabelledData:
    """Where labelled images come from, and the crops to train on.

    Attributes:
      shards: folders of shard sets with labels.
      train_split, val_split, test_split: their splits; validation chooses the best checkpoint, the test split, if there
        is one of this name, is looked at once, at the end.
      weights: share of each shard set, see `PipelineConfig`.
      image_size: rows and columns of a training crop, multiples of 16.
      batch_size: images per step, over all hosts.
      seed: of order and crops.
      zoom: crops are enlarged by a factor uniform between these two, relative to the stored image.
      focus: probability that a crop contains a pixel of a class drawn evenly among the image's, background left out; in
        detection, the centre of an object of a class drawn so.
      flip: mirror left and right half of the time.
      augment: gain (contrast) and offset (brightness) vary as cameras do; hue and saturation mean nothing in infrared.
      intensity: stored integers to 8 bit; left at its default, that of the encoder's checkpoint.
      max_corrupt, workers, threads, prefetch: see `PipelineConfig`.
    """

    shards: tuple[str, ...] = ()
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    weights: tuple[float, ...] = ()
    image_size: tuple[int, int] = (512, 512)
    batch_size: Annotated[int, "[1, inf)"] = 16
    seed: Annotated[int, "[0, 4294967295]"] = 0
    zoom: tuple[float, float] = (0.5, 2.0)
    focus: Annotated[float, "[0, 1]"] = 0.0
    flip: bool = True
    augment: InfraredAugment = InfraredAugment(gain=0.5, offset=32.0)
    intensity: Intensity = Intensity()
    max_corrupt: Annotated[float, "[0, 1]"] = 0.01
    workers: Count = 0
    threads: Count = 2
    prefetch: Annotated[int, "[1, inf)"] = 4

    def __post_init__(self):
        assert self.pipeline and self.view()  # they check their own values

    @property
    def pipeline(self) -> PipelineConfig:
        """What reads the training split."""
        names = (
            "shards", "weights", "image_size", "batch_size", "seed", "max_corrupt", "workers", "threads", "prefetch",
        )  # fmt: skip
        return PipelineConfig(split=self.train_split, **{name: getattr(self, name) for name in names})

    def view(self, **labels: Any) -> LabelledView:
        """A training crop, with the labels that are asked for."""
        return LabelledView(
            self.image_size, zoom=self.zoom, focus=self.focus, flip=self.flip, augment=self.augment,
            intensity=self.intensity, **labels,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EmbeddedLabels:
    """Synthetic scenes with labels of all kinds, made where `images` > 0 and no shards are named."""

    images: Count = 0
    height: Annotated[int, "[16, inf)"] = 192
    width: Annotated[int, "[16, inf)"] = 256


@dataclasses.dataclass(frozen=True)
class FineTuneConfig(RunConfig):
    """A fine-tuning run, whatever its task.

    Attributes:
      checkpoint: the encoder: a run folder, a published `.pth` or `.safetensors` file, or "random".
      variant: of a random encoder; for a checkpoint, the variant that it must be, if given.
      encoder: how the encoder is computed (dtype, remat, drop_path, position, fuse_stages, ...). Its architecture
        (kind, channels, widths, depths, heads, MLP ratio) is that of the checkpoint.
      freeze: "encoder" trains the head alone, without drop path.
      layer_decay: the learning rate of each earlier layer is multiplied by this once more; 1 is off.
      classes: names in the order of their numbers, taken from the shards.
      windows: how large images are looked at in evaluation and prediction.
      evaluate_every: duration between evaluations on the validation split.
      data: labelled images.
      embedded: synthetic ones in their place.
      duration: "auto" is 100 epochs of a thousand images, fewer of more and more of fewer (from 20 to 400).
    """

    task: str = ""
    optimizer: OptimizerConfig = OptimizerConfig(
        base_learning_rate=1.6e-3, warmup="5 percent", schedule="polynomial", b2=0.999
    )
    duration: Annotated[str, "auto, duration"] = AUTO
    log_every: Duration = "20 steps"
    checkpoint_every: Duration = "10 percent"
    keep_checkpoints: Annotated[int, "[1, inf)"] = 1
    keep_best: Count = 1
    best_mode: Annotated[str, "min, max"] = "max"
    checkpoint: str = ""
    variant: str = ""
    encoder: EncoderConfig = EncoderConfig(fuse_stages=False, drop_path=0.2)
    freeze: Annotated[str, "none, encoder"] = "none"
    layer_decay: Annotated[float, "(0, 1]"] = 0.75
    classes: tuple[str, ...] = ()
    windows: Windows = Windows()
    evaluate_every: Duration = "10 percent"
    data: LabelledData = LabelledData()
    embedded: EmbeddedLabels = EmbeddedLabels()

    # What `resolved` finds in checkpoint and shards is compared all the same, under `encoder` and `data_set`.
    FREE_KEYS: ClassVar[tuple[str, ...]] = (
        *RunConfig.FREE_KEYS, "data.shards", "data.workers", "data.threads", "data.prefetch", "data.max_corrupt",
        "evaluate_every", "encoder.attention", "encoder.depthwise", "encoder.remat",
    )  # fmt: skip
    LABELS: ClassVar[str] = ""  # of the shards: which class names the task learns
    SYNTHETIC_MASK: ClassVar[str] = "surfaces"

    def completed(self) -> Self:
        """The config with what a task finds out about its training labels, once classes are known.

        Without shards (see `without_data`), with neutral values.
        """
        return self


def with_embedded(config: Config, workdir: str | Path) -> Config:
    """The config with shards of synthetic scenes, made on first use, where it names no shards."""
    embedded = config.embedded
    if config.data.shards or not embedded.images:
        return config
    shards = Path(workdir) / "data" / "scenes"
    if not shards.is_dir():
        print(f"making {embedded.images} labelled synthetic scenes in {shards}", flush=True)
        size = embedded.height, embedded.width
        write_shards(shards, embedded.images, size=size, mask=config.SYNTHETIC_MASK)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=(str(shards),)))


def resolved(config: Config, trained: TrainedModel | None = None, **options: Any) -> tuple[Config, TrainedModel]:
    """Fills in what checkpoint and shards say: architecture, intensity mapping, classes, duration.

    Args:
      trained: the encoder, where it is loaded already.
      options: of `interop.load.load`.

    Returns:
      The whole config, and the encoder to start with.

    Raises:
      InputError: no checkpoint or one that cannot be read; shards without such labels, or with different classes.
    """
    require_checkpoint(config)
    classes = class_names(config)
    trained = trained or load_encoder(config.checkpoint, config.variant, **options)
    architecture = {name: getattr(trained.config.encoder, name) for name in ARCHITECTURE}
    architecture["position_grid"] = token_grid(*trained.image_size)
    data = config.data
    if data.intensity == Intensity():
        data = dataclasses.replace(data, intensity=trained.intensity)
    elif data.intensity != trained.intensity:
        print(f"images by {data.intensity}, not by the checkpoint's own {trained.intensity}", flush=True)
    duration = config.duration
    if duration == AUTO:
        duration = usual_duration(pipeline.num_examples(data.pipeline))
    try:
        encoder = dataclasses.replace(config.encoder, **architecture)
    except ValueError as error:
        raise InputError(f"config {error}") from error
    config = dataclasses.replace(config, encoder=encoder, data=data, duration=duration, classes=classes)
    return config.completed(), trained


def usual_duration(images: int) -> str:
    """What "auto" is for so many training images."""
    epochs = round(_FULL_EPOCHS * math.sqrt(_FULL_IMAGES / images))
    return f"{min(max(epochs, _FEWEST_EPOCHS), _MOST_EPOCHS)} epochs"


def without_data(config: Config, classes: int = 9) -> Config:
    """What `resolved` makes of a config for random weights, without data: to measure or to compile, not to train.

    `classes`: how many the model tells apart where the config does not name any.
    """
    encoder = variant(config.variant or "tiny").encoder
    architecture = {name: getattr(encoder, name) for name in ARCHITECTURE}
    architecture["position_grid"] = token_grid(*DEFAULT_SIZE)
    names = config.classes or tuple(f"class {number}" for number in range(classes))
    config = dataclasses.replace(
        config, checkpoint="random", classes=names, encoder=dataclasses.replace(config.encoder, **architecture),
        data=dataclasses.replace(config.data, shards=()),
    )  # fmt: skip
    return config.completed()


def require_checkpoint(config: FineTuneConfig) -> None:
    """InputError where the config names no encoder to start from, or one that is not there."""
    if not config.checkpoint:
        raise InputError("no encoder to start from: give --checkpoint=RUN, a .pth or .safetensors file, or random")
    if config.checkpoint != RANDOM and not os.path.exists(local_path(config.checkpoint, "checkpoint")):
        raise InputError(f"checkpoint {config.checkpoint} does not exist; give a run folder, a file or {RANDOM!r}")


def class_names(config: FineTuneConfig) -> tuple[str, ...]:
    """The classes of the shards, the same in all; InputError where there are none or the splits are missing."""
    if not config.data.shards:
        raise InputError("data.shards is empty; name a shard set with labels, made by `infmae build`")
    manifests = dict(zip(config.data.shards, manifests_of(config), strict=True))
    first = None
    for name, manifest in manifests.items():
        classes = manifest.classes.get(config.LABELS)
        if not classes:
            known = ", ".join(manifest.classes) or "none"
            raise InputError(f"{name} has no labels of the kind {config.LABELS!r} (it has {known}): build it with them")
        if first not in (None, tuple(classes)):
            raise InputError(f"{name} has the classes {', '.join(classes)}, the sets before it {', '.join(first)}")
        first = tuple(classes)
        for split in (config.data.train_split, config.data.val_split):
            if split not in manifest.splits or not manifest.splits[split].count:
                raise InputError(
                    f"{name} has no images in a split {split!r} (it has {', '.join(manifest.splits)}): set "
                    "data.train_split and data.val_split, or build it with one"
                )
    return first


def manifests_of(config: FineTuneConfig) -> list[Manifest]:
    return [read_manifest(folder) for folder in local_folders(config.data.shards)]


def fingerprint_of(config: FineTuneConfig) -> dict[str, Any]:
    """What identifies the data set: hosts and resumed runs must agree on it."""
    return {"fingerprints": [manifest.fingerprint for manifest in manifests_of(config)]}
