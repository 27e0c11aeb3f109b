"""`infmae_jax.load`: a trained model from wherever it is stored, and back to where it should go."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.files import atomic_write, local_path, output_file, writing
from data_pipelines.intensity import Intensity
from data_pipelines.masking import MaskConfig
from infmae_jax.interop import published, safetensors_file, stablehlo, torch_file
from infmae_jax.interop.trained_model import DEFAULT_SIZE, TrainedModel
from infmae_jax.models.config import VARIANTS, EncoderConfig, InfMAEConfig, variant
from infmae_jax.models.infmae import InfMAE, abstract_params
from infmae_jax.models.patches import PATCH
from infmae_jax.training.checkpoint import restore_params, write_run
from infmae_jax.training.config import from_config
from infmae_jax.training.run_folder import read_config

READABLE = ("torch", "safetensors", "run")
WRITABLE = ("run", "safetensors", "jax-export")
RANDOM = "random"
_SCORE_FILTERS_FILE = "score_filters.safetensors"
ARCHITECTURE = ("kind", "in_channels", "widths", "depths", "heads", "mlp_ratio")  # of an encoder, as weights need it


def load(
    path: str | os.PathLike,
    step: int | None = None,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    norm_pix_loss: bool | None = None,
    source: str | None = None,
    subtree: str | None = None,
) -> TrainedModel:
    """Loads a trained model.

    Args:
      path: a run folder of this project, or a published checkpoint (`.pth`, `.safetensors`), with its decoder or as an
        encoder alone.
      step: which checkpoint of a run; the latest by default.
      heads, decoder_heads, norm_pix_loss: of a published checkpoint, whose tensors do not tell them; by default as
        noted in the file, else 12, 16 and False as published.
      source: one of `READABLE`; by default told from the path.
      subtree: of a run, load only "encoder".

    Returns:
      The model; `module, params = load(path)` gives the Flax module and its float32 parameters.

    Raises:
      InputError: the path is missing, damaged, or holds another architecture; one line says which and why.
    """
    name = os.path.expanduser(os.fspath(path))
    source = source or _detect(name)
    if source == "run":
        return _read_run(name, step, subtree)
    if not Path(name).is_file():
        raise InputError(f"{name} is not a file; give the checkpoint file itself")
    reader = torch_file if source == "torch" else safetensors_file
    tensors, extras = reader.read_checkpoint(name)
    try:
        trained = published.from_state(
            tensors, extras.get(published.METADATA_KEY), heads=heads, decoder_heads=decoder_heads,
            norm_pix_loss=norm_pix_loss,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return dataclasses.replace(trained, name=name)


def _detect(path: str) -> str:
    """Which of `READABLE` a path is, by its kind and name; InputError if there is nothing."""
    if Path(local_path(path, "checkpoint")).is_dir():
        return "run"
    if not Path(path).exists():
        raise InputError(f"{path} does not exist; give a run folder, a .pth or a .safetensors file")
    return "safetensors" if Path(path).suffix == ".safetensors" else "torch"


class Account(NamedTuple):
    """What `graft` did with each subtree of parameters: loaded, left new, or ignored in what was loaded."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        parts = (f"{title} {', '.join(names) or 'nothing'}" for title, names in zip(self._fields, self, strict=True))
        return "weights: " + "; ".join(parts)


def graft(
    params: Mapping[str, Any], loaded: TrainedModel, encoder: EncoderConfig | None = None
) -> tuple[dict[str, Any], Account]:
    """Puts loaded weights into the parameters of any model that has an encoder.

    Args:
      params: subtrees by name, "encoder" among them; arrays or shapes.
      loaded: from `load` or `load_encoder`. Of its other subtrees those are taken that are the same throughout.
      encoder: the architecture of `params`, compared where shapes do not tell it (attention heads).

    Returns:
      `params` with NumPy arrays where weights were loaded, and the account, to be printed.

    Raises:
      InputError: the loaded encoder is of another architecture or does not cover the whole of `params["encoder"]`.
    """
    found = loaded.config.encoder
    if encoder and not same_encoder(found, encoder):
        raise InputError(f"{loaded.name} is another encoder: {_describe(found)}, not {_describe(encoder)}")
    out, taken, ignored = dict(params), [], []
    for name, tree in params.items():
        source = _leaves(loaded.params.get(name, {}))
        target = _leaves(tree)
        missing = [path for path, leaf in target.items() if path not in source or source[path].shape != leaf.shape]
        if missing and name == "encoder":
            raise InputError(
                f"{loaded.name} does not cover the encoder: {len(missing)} of {len(target)} arrays are missing or of "
                f"another shape, {name}{missing[0]} first; use the checkpoint of the same variant"
            )
        if not missing and (name == "encoder" or source.keys() == target.keys()):
            out[name] = jax.tree_util.tree_map_with_path(lambda p, _: source[jax.tree_util.keystr(p)], tree)
            taken.append(name)
            ignored += [f"{name}{path}" for path in source if path not in target]
    ignored += [name for name in loaded.params if name not in taken]
    return out, Account(tuple(taken), tuple(name for name in params if name not in taken), tuple(ignored))


def write(
    path: str | os.PathLike, target: str, trained: TrainedModel, image_size: tuple[int, int], origin: Mapping[str, Any]
) -> None:
    """Writes a trained model; the path appears whole or not at all.

    Args:
      path: a file, or for "run" a folder; must not exist.
      target: one of `WRITABLE`.
      trained: the model.
      image_size: pixel rows and columns that "jax-export" takes.
      origin: where the model comes from, noted in a run's config.

    Raises:
      InputError: the path exists or cannot be written, or the format cannot hold the model.
    """
    path = free_output(path)
    with writing(path), atomic_write(path) as partial:
        if target == "run":
            _write_run(partial, trained, origin)
        elif target == "jax-export":
            partial.write_bytes(stablehlo.export_features(trained.config, trained.params, image_size))
        else:
            tensors, metadata = published.to_state(trained)
            safetensors_file.write_checkpoint(partial, tensors, {published.METADATA_KEY: metadata})


def free_output(given: str | os.PathLike) -> Path:
    """The path of a file or folder to write; InputError where something is there, or it cannot be written."""
    path = Path(local_path(given, "output"))
    if path.exists():
        raise InputError(f"{given} already exists; remove it or choose another --output")
    return output_file(path, "output")


def _read_run(path: str, step: int | None, subtree: str | None) -> TrainedModel:
    described = _described(path)
    restored = restore_params(path, subtree, step)
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), restored.params)
    if "model" not in restored.config:  # a fine-tuning run, whose heads are not InfMAE's
        params = {"encoder": params["encoder"]}
    blocks = sum(described.config.encoder.depths) + ("decoder" in params and described.config.decoder.depth)
    require_fit(path, params, blocks, lambda: {k: abstract_params(described.config).get(k, {}) for k in params})
    filters = _read_score_filters(Path(path), described.mask)
    return dataclasses.replace(described, params=params, step=restored.step, score_filters=filters)


def require_fit(run: str | os.PathLike, params: Any, blocks: int, expected: Callable[[], Any]) -> None:
    """InputError where parameters are not those of the config beside them, which may be a stranger's.

    Args:
      blocks: how many the config speaks of.
      expected: makes the tree of shapes that the config stands for; not called where there are more blocks than arrays.
    """
    have = {path: leaf.shape for path, leaf in _leaves(params).items()}
    if blocks > len(have):
        raise InputError(f"checkpoint of {run} does not fit its config: it has fewer than {blocks} blocks")
    try:
        want = {path: leaf.shape for path, leaf in _leaves(expected()).items()}
    except ValueError as error:
        raise InputError(f"config of {run} is of no model: {str(error).splitlines()[0]}") from error
    if wrong := sorted({path for path, _ in have.items() ^ want.items()}):
        raise InputError(
            f"checkpoint of {run} does not fit its config: {wrong[0]} and {len(wrong) - 1} more arrays differ; use the "
            "checkpoint of the same variant"
        )


@dataclasses.dataclass(frozen=True)
class _Images:
    """What the section `data` of a run's config says that belongs to a `TrainedModel`."""

    mask: MaskConfig = MaskConfig()
    image_size: tuple[int, int] = DEFAULT_SIZE
    intensity: Intensity = Intensity()


def _described(run: str) -> TrainedModel:
    """What the config of a run says, without weights."""
    config = read_config(run)
    model = config.get("model", {"encoder": config.get("encoder")})
    if not isinstance(model, dict) or not model.get("encoder"):
        if isinstance(config.get("task"), str) and "data_set" in config:  # see `run_folder.claim`
            raise InputError(f"{run} is a run of the task {config['task']!r}: give the run of its encoder")
        weights = sorted(Path(run).glob("*.safetensors"))
        raise InputError(
            f"{run} is not a run folder of this project: its config.json has no section 'model'; give a run folder, or "
            f"the weights file itself{f', {weights[0]}' if weights else ''}"
        )
    data = config.get("data", {})
    if isinstance(data, dict):
        data = {field.name: data[field.name] for field in dataclasses.fields(_Images) if field.name in data}
    try:
        images = from_config(_Images, data, "data.")
        return TrainedModel(from_config(InfMAEConfig, model, "model."), {}, **vars(images), name=run)
    except InputError as error:
        raise InputError(f"{run}: its config.json has another form: {error}") from error


def _read_score_filters(run: Path, mask: MaskConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """The published scoring convolution that came with an imported run, if it still is what the run masks with."""
    file = run / _SCORE_FILTERS_FILE
    if not file.exists():
        return None
    tensors, _ = safetensors_file.read_checkpoint(file)
    filters = tensors["weight"], tensors["bias"]
    return filters if published.published_mask(filters) == mask else None


def _write_run(run: Path, trained: TrainedModel, origin: Mapping[str, Any]) -> None:
    data = {
        "mask": dataclasses.asdict(trained.mask),
        "image_size": trained.image_size,
        "intensity": dataclasses.asdict(trained.intensity),
    }
    config = {"model": dataclasses.asdict(trained.config), "data": data, "source": dict(origin)}
    write_run(run, config, trained.params)
    if trained.score_filters is not None:
        tensors = dict(zip(("weight", "bias"), trained.score_filters, strict=True))
        safetensors_file.write_checkpoint(run / _SCORE_FILTERS_FILE, tensors, {})


def load_encoder(
    checkpoint: str,
    model: str = "",
    like: str = "",
    image_size: tuple[int, int] = (0, 0),
    seed: int = 0,
    **options: Any,
) -> TrainedModel:
    """Loads an encoder or makes an untrained one.

    Args:
      checkpoint: as for `load`, or "random" for an untrained encoder.
      model: variant of an untrained encoder ("" is "tiny"); for a checkpoint, the variant that it must be, if given.
      like: a run whose architecture, image size and intensity an untrained encoder takes, instead of `model`.
      image_size: rows and columns; (0, 0) takes those of the run, 224x224 where there is no run.
      seed: of an untrained encoder's weights.
      **options: of `load`.

    Raises:
      InputError: no such checkpoint, another variant, an unknown variant, sides not divisible by 16.
    """
    if checkpoint == RANDOM:
        if like and model:
            raise InputError(f"like={like} and model={model} both name an architecture; give one of them")
        described = _described(os.path.expanduser(like)) if like else TrainedModel(variant(model or "tiny"), {})
        trained = untrained(described.config, described.image_size, seed)
        trained = dataclasses.replace(trained, intensity=described.intensity)
    else:
        trained = load(checkpoint, subtree="encoder", **options)
        trained = dataclasses.replace(trained, params={"encoder": trained.params["encoder"]})
        if model and not same_encoder(variant(model).encoder, trained.config.encoder):
            found = _describe(trained.config.encoder)
            raise InputError(f"checkpoint {checkpoint} is not the variant {model!r} but {found}; leave model empty")
    size = tuple(image_size) if any(image_size) else trained.image_size
    if len(size) != 2 or any(side < PATCH or side % PATCH for side in size):
        raise InputError(f"image_size {size} must be rows, columns, both multiples of {PATCH}")
    return dataclasses.replace(trained, image_size=size)


def untrained(config: InfMAEConfig, image_size: tuple[int, int] = DEFAULT_SIZE, seed: int = 0) -> TrainedModel:
    """An encoder with its initial random weights: the baseline that shows what pretraining adds."""
    init = functools.partial(InfMAE(config).init, method="features", fuse_stages=config.encoder.fuse_stages)
    # It runs once: compiling it with optimisation costs twice the time and gains nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
        params = jax.tree.map(np.asarray, init(jax.random.key(seed), jnp.zeros((1, PATCH, PATCH, 1)))["params"])
    return TrainedModel(config, {"encoder": params["encoder"]}, image_size=image_size, name=RANDOM)


def same_encoder(a: EncoderConfig, b: EncoderConfig) -> bool:
    """Whether weights of one are weights of the other: the architecture, not how it is computed."""
    return all(getattr(a, field) == getattr(b, field) for field in ARCHITECTURE)


def _describe(encoder: EncoderConfig) -> str:
    names = [name for name in VARIANTS if same_encoder(variant(name).encoder, encoder)]
    whole = f"{encoder.kind} of widths {encoder.widths}, depths {encoder.depths} and {encoder.heads} heads"
    return names[0] if names else whole


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
