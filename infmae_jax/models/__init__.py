"""Pure Flax Linen modules and their frozen dataclass configs: no I/O, no ConfigDict, no globals.

Shape letters, used in names and docstrings everywhere:

    B  batch                       N  tokens of an image, h * w
    H, W  pixel rows, columns      K  visible (kept) tokens of an image
    h, w  token rows, columns      P  values of a patch vector, 16 * 16 * channels
    C  channels                    D  width (features of a token)

In segmentation and detection K is classes; in detection M is objects, R regions, D detections of an image.

Arrays are channels-last (NHWC). A *cell* is one position of a convolution stage: a patch has 4 x 4 cells in stage 1,
2 x 2 in stage 2 and is one token from stage 3 on.
"""
