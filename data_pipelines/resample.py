"""Antialiased bicubic resize of one-channel 8-bit images: Pillow's within one level, in two fifths of its time.

A resize is two passes, each a banded matrix (output pixels x input pixels) times the image, done as small dense
products of blocks along the band. Weights and the order of the passes are Pillow's, but between the passes quarters of
a level are kept where Pillow rounds to whole ones: the result is nearer to the filter's exact value, and never more
than one level from Pillow's.

Weights and the values between the passes are binary fractions of so few digits that every product and every sum is
exact in float32. So the result does not depend on the order of additions: it is the same on every machine, BLAS and
number of threads, and whichever version of Pillow is installed (the order of its passes changed in 13.0).
"""

import functools

import numpy as np

CUBIC = -0.5
CUBIC_REACH = 2.0
# Digits after the point. With the 8 before it (and a third of one for overshoot), those of a pass's values and of its
# weights must add up to less than float32's 24: 0 + 15 in the first pass, 2 + 13 in the second.
FIRST_WEIGHT_BITS = 15
BETWEEN_BITS = 2
SECOND_WEIGHT_BITS = 13
# Output pixels a block: wider blocks multiply more zeros (the more, the more an image shrinks), narrower ones cost more
# calls.
BLOCK = 16
ENLARGING_BLOCK = 32
# Products above this (rows * inputs * outputs) would wake BLAS threads, which fight with those of the pipeline.
SERIAL_PRODUCT = 1 << 19
# A range of input pixels, one of output pixels, the weights (inputs, outputs) float32 between them, and how many rows
# or columns of the image are to be multiplied at once.
Block = tuple[slice, slice, np.ndarray, int]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bicubic resize (Keys 1981, a = -0.5; the filter widens when shrinking).

    Args:
      image: (H, W) uint8.
      size: rows and columns of the result.

    Returns:
      (size[0], size[1]) uint8, C-contiguous; `image` itself when nothing is to be done.
    """
    passes = [(1, image.shape[1], size[1]), (0, image.shape[0], size[0])]
    # Pillow's rule, which spares work when the height shrinks by far more.
    if image.shape[0] > size[0] and image.shape[0] - size[0] > 2 * (image.shape[1] - size[1]):
        passes.reverse()
    passes = [(along, length, out) for along, length, out in passes if length != out]
    if not passes:
        return np.ascontiguousarray(image)
    values = image.astype(np.float32)
    bits = [(FIRST_WEIGHT_BITS, BETWEEN_BITS), (SECOND_WEIGHT_BITS, -BETWEEN_BITS)]
    if len(passes) == 1:
        bits = [(FIRST_WEIGHT_BITS, 0)]
    for (along, length, out), (weight_bits, gain_bits) in zip(passes, bits, strict=True):
        values = _resize_axis(values, along, _blocks(length, out, weight_bits, gain_bits))
        if gain_bits > 0:
            np.clip(np.rint(values, out=values), 0, 255 << BETWEEN_BITS, out=values)
    values += np.float32(0.5)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _resize_axis(values: np.ndarray, along: int, blocks: list[Block]) -> np.ndarray:
    """(H, W) float32, resized along axis 0 (rows) or 1 (columns)."""
    shape = list(values.shape)
    shape[along] = blocks[-1][1].stop
    sums = np.empty(shape, np.float32)
    for inputs, outputs, weights, chunk in blocks:
        for first in range(0, shape[1 - along], chunk):
            some = slice(first, first + chunk)
            if along:
                np.matmul(values[some, inputs], weights, out=sums[some, outputs])
            else:
                np.matmul(weights.T, values[inputs, some], out=sums[outputs, some])
    return sums


# Crops have a few hundred heights and widths, of some 40 kB each; making one takes as long as half a resize.
@functools.lru_cache(maxsize=2048)
def _blocks(length: int, out: int, bits: int, gain_bits: int) -> list[Block]:
    """Weights from `length` to `out` pixels, rounded to `bits` binary digits, times 2**gain_bits."""
    step = length / out
    widen = max(step, 1.0)
    reach = CUBIC_REACH * widen
    size = ENLARGING_BLOCK if length < out else BLOCK
    count = -(-out // size)
    # (blocks, 1, outputs); what the last block has too many repeats the last output.
    outputs = np.minimum(np.arange(count * size), out - 1).reshape(count, 1, size)
    centers = (outputs + 0.5) * step
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.int64), length)
    lows, highs = first[:, 0, 0], last[:, 0, -1]
    inputs = lows[:, None, None] + np.arange((highs - lows).max())[:, None]
    weights = _cubic((inputs - centers + 0.5) / widen) * ((inputs >= first) & (inputs < last))
    weights /= weights.sum(1, keepdims=True)
    weights = np.ldexp(np.rint(np.ldexp(weights, bits)), gain_bits - bits).astype(np.float32)
    blocks = []
    for number, (low, high) in enumerate(zip(lows.tolist(), highs.tolist(), strict=True)):
        start, end = number * size, min((number + 1) * size, out)
        dense = weights[number, : high - low, : end - start]
        blocks.append((slice(low, high), slice(start, end), dense, max(1, SERIAL_PRODUCT // dense.size)))
    return blocks


def _cubic(distance: np.ndarray) -> np.ndarray:
    x = np.abs(distance)
    near = ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    return np.where(x < 1.0, near, np.where(x < CUBIC_REACH, far, 0.0))
