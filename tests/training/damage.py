"""Harm to the files of checkpoints."""

import os


def checkpoints(run):
    """Names of what is in the run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path, bit=None):
    """Of the bits of the file, counted round and round; None: one in the middle."""
    data = bytearray(path.read_bytes())
    bit = 4 * len(data) if bit is None else bit % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)
