"""Dense features of whole images, as for transfer: images per second, against PyTorch in the same run on request."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infmae_jax.bench import timing
from infmae_jax.bench.results import report
from infmae_jax.bench.step import endless_run, settings_of, synthetic_batch
from infmae_jax.interop.trained_model import encode, images_at_once
from infmae_jax.models import patches
from infmae_jax.models.infmae import InfMAE
from infmae_jax.tasks.pretrain import PretrainConfig, PretrainTask

# Of pooled features of two frameworks, relative to their largest value.
_SAME_FEATURES = {"float32": 1e-4, "bfloat16": 5e-2}


def features(config: PretrainConfig, batch: int, rounds: int, against_torch: bool) -> dict[str, Any]:
    """Stages 1 to 3 and pooled features of uint8 images.

    Raises:
      InputError: PyTorch is asked for and not installed.
      ArithmeticError: its features differ by more than rounding.
    """
    images = synthetic_batch(PretrainTask(endless_run(config, batch)))["image"]
    module = InfMAE(config.model)
    params = jax.jit(module.init)(jax.random.key(0), patches.normalize(images[:1]), jnp.zeros((1, 1), int))["params"]
    encoder, on_device = {"encoder": params["encoder"]}, jax.device_put(images)

    def ours(times: int) -> np.ndarray:
        for _ in range(times):
            out = encode(config.model, encoder, on_device, config.data.image_size, average=False)
        return np.asarray(jax.block_until_ready(out)["pooled"], np.float32)

    calls = {"ours": ours}
    if against_torch:
        from infmae_jax.bench import torch_model

        model = torch_model.from_params(config.model, jax.device_get(params), config.data.image_size)
        theirs = calls["PyTorch eager"] = torch_model.feature_call(model, images)
        pooled = ours(1)
        difference = np.abs(theirs(1) - pooled).max() / np.abs(pooled).max()
        if not difference <= _SAME_FEATURES[config.model.encoder.dtype]:
            raise ArithmeticError(f"PyTorch's pooled features differ by {difference:.2g} of their largest value")
    seconds = timing.take_turns(calls, rounds)
    rows = [
        {"name": name, **timing.rate_row(seconds[name], batch)}
        | ({"ours_is_faster_by": timing.ratio(seconds[name], seconds["ours"])} if name != "ours" else {})
        for name in calls
    ]
    at_once = images_at_once(batch)
    settings = settings_of(config) | {"batch": batch, "images_at_once": at_once, "rounds": rounds}
    return report("features", settings, rows)
