"""TFDS builder `image_folder`: any folder or archives of infrared images, curated as `data_pipelines.prepare` does."""

from __future__ import annotations

import functools
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders.common import SPLITS, FolderBuilder, part_examples
from data_pipelines.curation import Filters
from data_pipelines.errors import InputError
from data_pipelines.sources import Listing, list_sources, split_into_parts

_PART_SIZE = 256


class ImageFolder(FolderBuilder):
    """Infrared images of a folder, at any depth, zip and tar files included.

    `manual_dir` (or its folder `images`) may hold folders named train, val, validation, test: the splits. Without any
    of them everything is `train`. Files that are no usable image are left out (see `data_pipelines.builders.build`).
    """

    filters = Filters()

    def _info(self) -> tfds.core.DatasetInfo:
        return self._dataset_info("Infrared images of a folder or of archives.", {})

    def listings(self, root: Path) -> dict[str, Listing]:
        """Every file of every split.

        Raises:
          InputError: there is none.
        """
        root = root / "images" if (root / "images").is_dir() else root
        folders = {name: root / name for name in SPLITS if (root / name).is_dir()} or {"train": root}
        listings = {split: list_sources([folder]) for split, folder in folders.items()}
        for split, listing in listings.items():
            if not listing.sources:
                raise InputError(f"no files below {folders[split]}: put images or archives there")
        return listings

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        listings = self.listings(Path(dl_manager.manual_dir))
        return {split: self._generate_examples(listing) for split, listing in listings.items()}

    def _generate_examples(self, listing: Listing):
        make = functools.partial(part_examples, filters=self.filters, bit_depth=self.builder_config.bit_depth)
        return self._generate(split_into_parts(listing.sources, _PART_SIZE), make)
