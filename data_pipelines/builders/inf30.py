"""TFDS builder `inf30`: the pretraining set of InfMAE from its published archive."""

from __future__ import annotations

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders.image_folder import ImageFolder
from data_pipelines.errors import InputError
from data_pipelines.prepare.inputs import Listing, list_sources

_CITATION = """\
@inproceedings{liu2024infmae,
  title={InfMAE: A Foundation Model in the Infrared Modality},
  author={Liu, Fangcen and Gao, Chenqiang and Zhang, Yaming and Guo, Junjie and Wang, Jinghao and Meng, Deyu},
  booktitle={European Conference on Computer Vision},
  year={2024}
}
"""


class Inf30(ImageFolder):
    """Inf30: 305,241 infrared images without labels, split train (InfMAE, sec. 3.1).

    `manual_dir` holds the published archive (zip or tar, in one or several files) as downloaded, or what it contains.
    Archives are read in place, nothing is unpacked.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the archive of Inf30 from the links that its authors publish with InfMAE and put it into manual_dir."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self._dataset_info(
            "Inf30, the pretraining set of InfMAE: infrared images without labels.",
            {},
            homepage="https://github.com/liufangcen/InfMAE",
            citation=_CITATION,
        )

    def listings(self, root: Path) -> dict[str, Listing]:
        listing = list_sources([root])
        if not listing.sources:
            raise InputError(f"{root} is empty: put the published archive of Inf30 there")
        return {"train": listing}
