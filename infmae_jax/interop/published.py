"""A published state dict and what this project makes of it: architecture, parameters, masks, and back.

Beside the parameters a published checkpoint holds the fixed position embeddings, which are checked and computed again
on the way out, and (InfMAE) the convolution that scores patches for the mask, whose channel mean is the host's kernel.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from data_pipelines.errors import InputError
from data_pipelines.masking import MaskConfig
from infmae_jax.interop import names, wrappers
from infmae_jax.interop.trained_model import DEFAULT_SIZE, TrainedModel
from infmae_jax.models.config import DecoderConfig, EncoderConfig, InfMAEConfig
from infmae_jax.models.patches import PATCH, position_embedding
from infmae_jax.training.config import from_config

METADATA_KEY = "infmae_jax"
# What tensors do not tell of an architecture, as published.
_UNTOLD = {"heads": 12, "decoder_heads": 16, "norm_pix_loss": False}
_SCORE_WEIGHT, _SCORE_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
_POSITIONS = ("pos_embed", "decoder_pos_embed")
_POSITION_TOLERANCE = 1e-4  # of float32 tables computed in another precision; half precision rounds further
_NAMES_SHOWN = 3
_MAX_DEPTH = 64  # blocks of a stage: more than any published model has


def from_state(state: Mapping[str, np.ndarray], metadata: str | None = None, **given: Any) -> TrainedModel:
    """Reads a published state dict, or the encoder of one (MAE publishes encoders alone).

    Args:
      state: published name -> array.
      metadata: what `to_state` wrote beside the tensors, if the file has it.
      **given: what tensors do not tell: attention `heads` and `decoder_heads`, and `norm_pix_loss`, whether the model
        predicts pixels normalised per patch; None takes that of the metadata, else the published 12, 16 and False.

    Raises:
      InputError: not the state dict of an InfMAE or MAE model, or tensors are missing, unknown or of the wrong shape
        (each named), or its position embedding is not the fixed one.
    """
    state = wrappers.strip_prefixes(dict(state))
    noted, mask = _read_metadata(metadata)
    config = _read_architecture(state, noted | {field: value for field, value in given.items() if value is not None})
    whole = _has_decoder(state)
    entries = [entry for entry in names.table(config) if whole or entry.path[0] == "encoder"]
    _check_tensors(state, config, entries, whole)
    image_size = DEFAULT_SIZE
    if whole or _POSITIONS[0] in state:
        image_size = tuple(extent * PATCH for extent in _check_positions(state, config, whole))
    params = {entry.path: entry.adopt(np.asarray(state[entry.name], np.float32)) for entry in entries}
    filters = None
    if config.encoder.kind == "hybrid" and _SCORE_WEIGHT in state:
        filters = tuple(np.asarray(state[name], np.float32) for name in (_SCORE_WEIGHT, _SCORE_BIAS))
    if mask is None:
        mask = MaskConfig() if config.encoder.kind == "hybrid" and filters is None else published_mask(filters)
    tree = traverse_util.unflatten_dict(params)
    return TrainedModel(config, tree, mask, image_size, score_filters=filters)


def to_state(checkpoint: TrainedModel) -> tuple[dict[str, np.ndarray], str]:
    """Writes a checkpoint in published names and layouts.

    Returns:
      name -> float32 array, and a line of JSON with what the published format has no place for (heads, mask).

    Raises:
      InputError: the checkpoint has no decoder, which the published format needs.
    """
    config = checkpoint.config
    params = traverse_util.flatten_dict(checkpoint.params)
    entries = names.table(config)
    absent = [entry.name for entry in entries if entry.path not in params]
    if absent:
        raise InputError(
            f"the checkpoint lacks {_listing(absent)}, so it cannot be written in the published format: convert it "
            "with --to=jax-export, or the run that pretrained its encoder"
        )
    state = {}
    if config.encoder.kind == "hybrid":
        state[_SCORE_WEIGHT], state[_SCORE_BIAS] = checkpoint.score_filters or score_filters(config, checkpoint.mask)
    grid = tuple(extent // PATCH for extent in checkpoint.image_size)
    state.update(zip(_POSITIONS, _published_positions(config, grid), strict=True))
    state.update({entry.name: entry.publish(np.asarray(params[entry.path], np.float32)) for entry in entries})
    untold = (config.encoder.heads, config.decoder.heads, config.norm_pix_loss)
    model = dict(zip(_UNTOLD, untold, strict=True))
    return state, json.dumps({"model": model, "mask": dataclasses.asdict(checkpoint.mask)})


def published_mask(filters: tuple[np.ndarray, np.ndarray] | None) -> MaskConfig:
    """As the published code masks: MAE at random, InfMAE every fourth token of the ascending order of its filters.

    Args:
      filters: weight (D,C,16,16) and bias (D,) of InfMAE's scoring convolution. Averaging over channels commutes with
        the convolution, so the mask's one kernel is their mean.
    """
    if filters is None:
        return MaskConfig(score="none", selection="random")
    kernel = filters[0].astype(np.float64).mean(axis=0).transpose(1, 2, 0)
    bias = float(filters[1].astype(np.float64).mean())
    published = dict(score="kernel", kernel=kernel.tolist(), bias=bias, descending=False, stride=4)
    return from_config(MaskConfig, published, "mask.")


def score_filters(config: InfMAEConfig, mask: MaskConfig) -> tuple[np.ndarray, np.ndarray]:
    """A scoring convolution for the published code: weight (D,C,16,16) and bias (D,).

    All its filters are the mask's kernel, so their mean is too. The published order is ascending: a descending score
    is negated. Scores that are no linear filter are written as the gray mean, highest first.
    """
    if mask.score == "kernel":
        sign = -1.0 if mask.descending else 1.0
        kernel, bias = sign * np.asarray(mask.kernel, np.float64).transpose(2, 0, 1), sign * mask.bias
    else:
        sign = 1.0 if mask.score == "gray_mean" and not mask.descending else -1.0
        channels = config.encoder.in_channels
        kernel, bias = np.full((channels, PATCH, PATCH), sign / (channels * PATCH**2)), 0.0
    width = config.encoder.widths[-1]
    weight = np.broadcast_to(kernel.astype(np.float32), (width, *kernel.shape))
    return np.ascontiguousarray(weight), np.full((width,), bias, np.float32)


def _read_metadata(metadata: str | None) -> tuple[dict[str, Any], MaskConfig | None]:
    """What tensors do not tell of the architecture, published values where nothing is noted; the mask, if noted."""
    if not metadata:
        return dict(_UNTOLD), None
    try:
        fields = json.loads(metadata)
        model = {field: type(default)(fields["model"][field]) for field, default in _UNTOLD.items()}
        mask = from_config(MaskConfig, fields["mask"], "mask.")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"its {METADATA_KEY!r} entry is damaged; remove the entry or copy the file again") from error
    return model, mask


def _read_architecture(state: Mapping[str, np.ndarray], untold: dict[str, Any]) -> InfMAEConfig:
    """Widths and depths as the tensors have them; what they cannot tell comes from `untold`."""
    hybrid = any(name.startswith(("patch_embed1.", "blocks3.")) for name in state)
    if not hybrid and not ("cls_token" in state and any(name.startswith("blocks.") for name in state)):
        raise InputError(
            "it is not the state dict of an InfMAE or MAE model: it has neither patch_embed1 nor cls_token and blocks, "
            f"but {_listing(list(state))}"
        )
    stages = ("1", "2", "3") if hybrid else ("",) * 3
    shapes = [_shape(state, f"patch_embed{stage}.proj.weight", 4) for stage in stages]
    widths = tuple(shape[0] for shape in shapes)
    hidden = _shape(state, f"blocks{stages[2]}.0.mlp.fc1.weight", 2)[0]
    if hidden % widths[-1]:
        raise InputError(f"its MLPs are {hidden} wide, not a multiple of the width {widths[-1]}")
    decoder = {}
    if _has_decoder(state):
        width, depth = _shape(state, "decoder_embed.weight", 2)[0], _depth(state, "decoder_blocks")
        decoder = {"width": width, "depth": depth, "heads": untold["decoder_heads"]}
    try:
        encoder = EncoderConfig(
            kind="hybrid" if hybrid else "vit",
            in_channels=shapes[0][1],
            widths=widths,
            depths=tuple(_depth(state, f"blocks{stage}") for stage in stages),
            heads=untold["heads"],
            mlp_ratio=hidden // widths[-1],
            fuse_stages=not hybrid or any(name.startswith("stage1_output_decode.") for name in state),
        )
        return InfMAEConfig(encoder, DecoderConfig(**decoder), untold["norm_pix_loss"])
    except ValueError as error:
        raise InputError(f"{error}; give the checkpoint's own --heads and --decoder_heads") from error


def _has_decoder(state: Mapping[str, np.ndarray]) -> bool:
    return any(name == "mask_token" or name.startswith("decoder_") for name in state)


def _shape(state: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"tensor {name} is missing: half a checkpoint, or another architecture's")
    if state[name].ndim != rank or 0 in state[name].shape:
        raise InputError(f"tensor {name} has shape {state[name].shape}, {rank} axes expected")
    return state[name].shape


def _depth(state: Mapping[str, np.ndarray], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\.")
    deepest = max((int(match[1]) for name in state if (match := pattern.match(name))), default=-1)
    return min(deepest + 1, _MAX_DEPTH)  # a made-up index must not make a model of thousands of blocks


def _check_tensors(
    state: Mapping[str, np.ndarray], config: InfMAEConfig, entries: list[names.Entry], whole: bool
) -> None:
    expected = {entry.name: entry.shape for entry in entries}
    required = list(expected)
    if config.encoder.kind == "hybrid":
        width = config.encoder.widths[-1]
        expected |= {_SCORE_WEIGHT: (width, config.encoder.in_channels, PATCH, PATCH), _SCORE_BIAS: (width,)}
    if whole:  # what an encoder alone may lack is computed or has a default
        required = [*expected, *_POSITIONS]
    missing = [name for name in required if name not in state]
    unknown = [name for name in state if name not in expected and name not in _POSITIONS]
    misshaped = [
        f"{name} {state[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    integers = [name for name in state if state[name].dtype.kind in "biu"]
    problems = {"missing": missing, "unknown": unknown, "of the wrong shape": misshaped, "of integers": integers}
    found = [f"{len(listed)} {what}: {_listing(listed)}" for what, listed in problems.items() if listed]
    if found:
        raise InputError(f"its tensors do not fit an InfMAE or MAE model; {'; '.join(found)}")


def _listing(items: list[str]) -> str:
    shown = ", ".join(items[:_NAMES_SHOWN])
    return shown if len(items) <= _NAMES_SHOWN else f"{shown} and {len(items) - _NAMES_SHOWN} more"


def _published_positions(config: InfMAEConfig, grid: tuple[int, int]) -> list[np.ndarray]:
    """`pos_embed` and `decoder_pos_embed`: (1,N,D), a row of zeros first where there is a class token."""
    prefix = int(config.encoder.kind == "vit")
    widths = (config.encoder.widths[-1], config.decoder.width)
    return [np.pad(position_embedding(grid, width), ((prefix, 0), (0, 0)))[None] for width in widths]


def _tolerance(array: np.ndarray) -> float:
    return max(_POSITION_TOLERANCE, float(ml_dtypes.finfo(array.dtype).eps))


def _check_positions(state: Mapping[str, np.ndarray], config: InfMAEConfig, whole: bool) -> tuple[int, int]:
    """The token grid whose fixed embeddings the file holds; the published format does not say it otherwise."""
    prefix = int(config.encoder.kind == "vit")
    present = _POSITIONS if whole else _POSITIONS[:1]
    widths = (config.encoder.widths[-1], config.decoder.width)
    tokens = _shape(state, _POSITIONS[0], 3)[1] - prefix
    shapes = [(1, prefix + tokens, width) for width in widths[: len(present)]]
    if tokens > 0 and [state[name].shape for name in present] == shapes:
        # The first channel of the second half is the sine of the row: 0 in the first row, 0.84 in the second.
        rows_sine = np.asarray(state[_POSITIONS[0]][0, prefix:, widths[0] // 2], np.float32)
        columns = int(np.argmax(rows_sine > 0.5)) or tokens
        if tokens % columns == 0:
            expected = _published_positions(config, (tokens // columns, columns))
            pairs = [(state[name], table) for name, table in zip(present, expected, strict=False)]
            if all(np.abs(found - table).max() <= _tolerance(found) for found, table in pairs):
                return tokens // columns, columns
    raise InputError(
        f"its {' and '.join(present)} are not the fixed sin-cos position embeddings of any grid of {tokens} tokens; "
        "learned or interpolated ones are not supported"
    )
