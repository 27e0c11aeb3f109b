"""TFDS builder `inf30`: the pretraining set of InfMAE from its published archive."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.builders.image_folder import ImageFolder


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
