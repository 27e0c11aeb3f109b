"""Floating-point operations of a training step: counted by hand, stage by stage, and by XLA.

A multiply-add is two operations. The hand count has convolutions, linear layers and attention only, as the
architecture has them; XLA's also has norms, activations, softmax and loss.
"""

from typing import Any

import jax
import jax.numpy as jnp

from infmae_jax.bench.results import Row, report
from infmae_jax.models import patches
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.infmae import InfMAE, abstract_params

_KERNEL = 5 * 5  # of a depthwise convolution
_PIXELS = patches.PATCH**2
STAGES = ("stage 1 blocks", "stage 2 blocks", "stage 3 blocks", "embeddings, fusion", "decoder")
# Ways to compute the same model: without what neither its loss nor its gradients depend on, which is the default, and
# as published, every patch, masked or not. Changes of its config.
WAYS = {
    "visible only": {"visible_only": True, "predict_masked_only": True},
    "as published": {"visible_only": False, "predict_masked_only": False},
}


def hand_count(model: InfMAEConfig, image_size: tuple[int, int], keep: int, visible_only: bool) -> dict[str, float]:
    """GFLOP per image of the forward pass by stage (`STAGES`), counted from the architecture.

    Args:
      keep: visible tokens K.
      visible_only: the useful operations: convolution stages on visible patches of a one-channel image, the last
        decoder block and the prediction for masked ones. Otherwise those of the published way: every patch, three equal
        channels.
    """
    h, w = patches.token_grid(*image_size)
    tokens = h * w
    computed, channels, predicted = tokens, model.encoder.in_channels, tokens
    if visible_only:
        computed, channels, predicted = keep, 1, tokens - keep
    width1, width2, width3 = model.encoder.widths
    inner, ratio = model.decoder.width, model.encoder.mlp_ratio

    def decoder(length: int) -> int:
        """Blocks over so many tokens; what the last one makes of tokens that are not predicted is not needed."""
        whole = (model.decoder.depth - 1) * _transformer_block(length, length, inner, ratio)
        return whole + _transformer_block(length, predicted if visible_only else length, inner, ratio)

    prediction = predicted * _PIXELS * model.encoder.in_channels * inner
    if model.encoder.kind == "vit":
        # The class token is in every block; masked patches are dropped before the embedding is of use.
        multiplies = {
            STAGES[2]: model.encoder.depths[-1] * _transformer_block(keep + 1, keep + 1, width3, ratio),
            STAGES[3]: computed * _PIXELS * channels * width3,
            STAGES[4]: (keep + 1) * width3 * inner + decoder(tokens + 1) + prediction,
        }
    else:
        cells1, cells2 = 16 * computed, 4 * computed
        embeddings = (
            cells1 * 16 * channels * width1 + cells2 * 4 * width1 * width2 + computed * 4 * width2 * width3
            + computed * width3**2
        )  # fmt: skip
        fusion = model.encoder.fuse_stages * computed * (16 * width1 + 4 * width2) * width3
        multiplies = {
            STAGES[0]: model.encoder.depths[0] * _conv_block(cells1, width1, ratio),
            STAGES[1]: model.encoder.depths[1] * _conv_block(cells2, width2, ratio),
            STAGES[2]: model.encoder.depths[2] * _transformer_block(keep, keep, width3, ratio),
            STAGES[3]: embeddings + fusion,
            STAGES[4]: keep * width3 * inner + decoder(tokens) + prediction,
        }
    return {stage: 2 * count / 1e9 for stage, count in multiplies.items()}


def useful_gflop(model: InfMAEConfig, image_size: tuple[int, int], keep: int) -> float:
    """GFLOP per image that a training step cannot do without, for the model FLOPs utilisation: three times the forward
    pass on visible patches (the gradients of inputs and of weights each cost as much as the layer itself)."""
    return 3 * sum(hand_count(model, image_size, keep, visible_only=True).values())


def _conv_block(cells: int, width: int, ratio: int) -> int:
    return cells * (2 * width**2 + _KERNEL * width + 2 * ratio * width**2)


def _transformer_block(tokens: int, queries: int, width: int, ratio: int) -> int:
    """Keys and values of all tokens, everything else for the queries alone."""
    return tokens * 2 * width**2 + queries * (2 + 2 * ratio) * width**2 + 2 * queries * tokens * width


def xla_count(
    model: InfMAEConfig, image_size: tuple[int, int], keep: int, compiled: bool = True, encoder_only: bool = False
) -> dict[str, float]:
    """GFLOP per image, "forward" and "forward + backward", by XLA's cost analysis of the program.

    Args:
      compiled: of the compiled program, or before optimisation (which is fast).
      encoder_only: of the latent, not of the loss.
    """
    module, batch = InfMAE(model), 2
    # The published way repeats the one channel.
    channels = 1 if model.encoder.visible_only else model.encoder.in_channels
    images = jax.ShapeDtypeStruct((batch, *image_size, channels), jnp.uint8)
    ids_keep = jax.ShapeDtypeStruct((batch, keep), jnp.int32)

    def scalar(params, images, ids_keep):
        images = patches.normalize(images)
        if encoder_only:
            return module.apply({"params": params}, images, ids_keep, method=lambda m, *x: m.encoder(*x)).sum()
        return module.apply({"params": params}, images, ids_keep).loss

    params = abstract_params(model)
    counts = {}
    for name, function in (("forward", scalar), ("forward + backward", jax.value_and_grad(scalar))):
        program = jax.jit(function).lower(params, images, ids_keep)
        counts[name] = (program.compile() if compiled else program).cost_analysis()["flops"] / batch / 1e9
    return counts


def flops(model: InfMAEConfig, image_size: tuple[int, int], keep: int, compiled: bool = True) -> dict[str, Any]:
    """GFLOP per image, on visible patches alone and as published (every masked patch computed too).

    Args:
      compiled: count the whole step in the compiled program; before optimisation otherwise.
    """
    # Float32 keeps conversions, which XLA counts as operations, out of the figures.
    model = model.replace(dtype="float32")
    rows: list[Row] = []
    for way, change in WAYS.items():
        config = model.replace(**change)
        by_hand = hand_count(config, image_size, keep, config.encoder.visible_only)
        rows += [{"way": way, "stage": stage, "by_hand": gflop} for stage, gflop in by_hand.items()]
        counts = xla_count(config, image_size, keep, compiled)
        by_xla = {"xla_forward": counts["forward"], "xla_forward_backward": counts["forward + backward"]}
        rows.append({"way": way, "stage": "all", "by_hand": sum(by_hand.values()), **by_xla})
    notes = [
        "GFLOP per image; by_hand and xla_forward: forward pass. XLA's count is that of the compiled program (with "
        "--quick before optimisation), with one of five turns of the loop in the depthwise kernels' gradient."
    ]
    settings = {"image_size": list(image_size), "visible_tokens": keep, "encoder": model.encoder.kind}
    return report("flops", settings, rows, notes)
