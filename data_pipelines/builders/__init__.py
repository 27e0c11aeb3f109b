"""TensorFlow Datasets builders, ArrayRecord on disk, no TensorFlow needed to build or to read.

Importing this package registers them with `tfds.builder` and `tfds.data_source`.
"""

from data_pipelines.builders.coco_boxes import CocoBoxes, WeakSmallTargets
from data_pipelines.builders.image_folder import ImageFolder, Inf30
from data_pipelines.builders.masks import ClassMasks, SmallTargets

__all__ = ["ClassMasks", "CocoBoxes", "ImageFolder", "Inf30", "SmallTargets", "WeakSmallTargets"]
