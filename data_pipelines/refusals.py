"""Why a file is not usable as an image: the named reasons, and the one exception that carries them.

    empty_file               the file has no bytes
    not_an_image             the content is of none of the supported formats
    truncated                the file ends before the image does
    corrupt_data             the image data are damaged
    decompression_bomb       the image unpacks to more than allowed, or its parts take more time than allowed
    unsupported_depth        several channels of more than 8 bit
    unsupported_layout       sound, but stored in a way that is not read
    not_finite               NaN or infinity among the pixels
    mostly_nodata            most of the pixels are declared to hold no data
    radiometric_unreadable   a picture that renders another array, which cannot be read
"""


class ImageRefused(ValueError):
    """A file that is not usable as an image.

    Attributes:
      reason: one of those at the top of this module, or of `prepare.curate`.
      detail: what exactly, for a person; one line.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
