"""TFDS builder `image_folder`: any folder or archives of infrared images, curated as `data_pipelines.prepare` does."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders.common import SPLITS, InfraredBuilder, part_features
from data_pipelines.errors import InputError
from data_pipelines.prepare.archives import Rejection
from data_pipelines.prepare.collect import read_images
from data_pipelines.prepare.curate import Filters
from data_pipelines.prepare.inputs import Listing, list_sources, split_into_parts
from data_pipelines.prepare.results import write_rejected

_PART_SIZE = 256


class ImageFolder(InfraredBuilder):
    """Infrared images of a folder, at any depth, zip and tar files included.

    `manual_dir` (or its folder `images`) may hold folders named train, val, validation, test: the splits. Without any
    of them everything is `train`. Files that are no usable image are left out, with a reason in `rejected.csv` beside
    the shards.
    """

    @property
    def filters(self) -> Filters:
        """Those of `prepare`, and the depth of this config."""
        return Filters(bit_depth=self.builder_config.bit_depth)

    def folders(self, root: Path) -> dict[str, Path]:
        """The folder of each split."""
        root = root / "images" if (root / "images").is_dir() else root
        return {name: root / name for name in SPLITS if (root / name).is_dir()} or {"train": root}

    def listings(self, root: Path) -> dict[str, Listing]:
        """Every file of every split.

        Raises:
          InputError: there is none.
        """
        listings = {}
        for split, folder in self.folders(root).items():
            listings[split] = list_sources([folder])
            if not listings[split].sources:
                raise InputError(f"no files below {folder}: put images or archives there")
        return listings

    def _account_for_files(self, root: Path) -> dict[str, int]:
        """Writes `rejected.csv`: why each file of the source that is not in the built set is not."""
        rejections: list[Rejection] = []
        for split, listing in self.listings(root).items():
            kept = {example.key for example in self.examples(split)}
            rejections += listing.rejections
            # Found again, not passed on: with Beam the examples were made in other processes, on other machines.
            missing = [source for source in listing.sources if source.key not in kept]
            for example, _ in read_images(missing, self.filters, rejections):
                rejections.append(Rejection(example.key, "changed", "usable now, was not when the set was built"))
        write_rejected(self.data_path, sorted(rejections, key=lambda row: row.key))
        return dict(Counter(rejection.reason for rejection in rejections).most_common())

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        make = functools.partial(part_features, filters=self.filters)
        listings = self.listings(Path(dl_manager.manual_dir))
        return {
            split: self._generate(split_into_parts(listing.sources, _PART_SIZE), make)
            for split, listing in listings.items()
        }

    def _generate_examples(self):
        """Examples are made by `_generate`."""
