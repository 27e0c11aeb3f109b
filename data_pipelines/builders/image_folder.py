"""TFDS builders `image_folder` and `inf30`: any infrared images, curated as `data_pipelines.prepare` does."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from data_pipelines.builders.common import Features, InfraredBuilder, folders_of
from data_pipelines.errors import InputError
from data_pipelines.examples import Example
from data_pipelines.prepare.archives import Rejection, Source
from data_pipelines.prepare.collect import read_images
from data_pipelines.prepare.curate import Filters
from data_pipelines.prepare.inputs import Listing, list_sources, split_into_parts
from data_pipelines.prepare.results import write_rejected


class ImageFolder(InfraredBuilder):
    """Infrared images of a folder, at any depth, zip and tar files included.

    `manual_dir` (or its folder `images`) may hold folders named train, val, validation, test: the splits. Without any
    of them everything is `train`. Files that are no usable image are left out, with a reason in `rejected.csv` beside
    the shards.
    """

    def folders(self, root: Path) -> dict[str, Path]:
        """The folder of each split."""
        root = root / "images" if (root / "images").is_dir() else root
        return folders_of(root) or {"train": root}

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

    def _account_for_files(self, root: Path, kept: set[str]) -> dict[str, int]:
        """Writes `rejected.csv`: why each file of the source that is not in the built set is not."""
        rejections: list[Rejection] = []
        for listing in self.listings(root).values():
            rejections += listing.rejections
            # Found again, not passed on: with Beam the examples were made in other processes, on other machines.
            missing = [source for source in listing.sources if source.key not in kept]
            for example, _ in read_images(missing, Filters(bit_depth=self.builder_config.bit_depth), rejections):
                rejections.append(Rejection(example.key, "changed", "usable now, was not when the set was built"))
        return write_rejected(self.data_path, sorted(rejections, key=lambda row: row.key))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        listings = self.listings(Path(dl_manager.manual_dir))
        parts = {split: split_into_parts(listing.sources) for split, listing in listings.items()}
        return {split: self._generate_examples(part, _examples) for split, part in parts.items()}


class Inf30(ImageFolder):
    """Inf30, the pretraining set of InfMAE: 305,241 infrared images without labels, split train (InfMAE, sec. 3.1).

    `manual_dir` holds the published archive (zip or tar, in one or several files) as downloaded, or what it contains.
    Archives are read in place, nothing is unpacked.

    Liu, Gao, Zhang, Guo, Wang, Meng: InfMAE: A Foundation Model in the Infrared Modality, ECCV 2024.
    https://github.com/liufangcen/InfMAE
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the archive of Inf30 from the links that its authors publish with InfMAE and put it into manual_dir."
    )

    def folders(self, root: Path) -> dict[str, Path]:
        return {"train": root}


def _examples(part: Sequence[Source], bit_depth: int) -> Iterator[tuple[Example, Features, dict[str, int]]]:
    """The usable files of a part of a listing, as `common.Make` says; the others are logged and left out."""
    refused: list[Rejection] = []
    for example, _ in read_images(part, Filters(bit_depth=bit_depth), refused):
        yield example, {}, {}
    for row in refused:
        logging.warning("left out %s: %s (%s)", row.key, row.reason, row.detail)
