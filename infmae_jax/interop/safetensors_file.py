"""safetensors files with the tensor names and layouts of the published checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which the reader needs
import numpy as np
import safetensors
import safetensors.numpy

from data_pipelines.errors import InputError


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (name -> array of the stored dtype) and metadata of a file; InputError if it is not a sound one."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except AttributeError as error:  # NumPy has no such dtype
        kind = str(error).split("'")[-2]
        raise InputError(f"{path} holds tensors of the element type {kind}, which is not supported") from error
    except (safetensors.SafetensorError, MemoryError, OverflowError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{path} is no sound safetensors file ({reason}); copy it again") from error


def write_checkpoint(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes float32 tensors; `metadata` goes into the file's header, with the mark that PyTorch tools look for."""
    arrays = {name: np.ascontiguousarray(array, np.float32).reshape(array.shape) for name, array in tensors.items()}
    Path(path).write_bytes(safetensors.numpy.save(arrays, {"format": "pt", **metadata}))
