"""Random weights in the published format: names and shapes written out from its description, not from the package."""

import math

import numpy as np

BASE = {
    "widths": (256, 384, 768),
    "depths": (2, 2, 11),
    "decoder_width": 512,
    "decoder_depth": 2,
}
TINY = {"widths": (8, 12, 16), "depths": (2, 1, 3), "decoder_width": 32, "decoder_depth": 2}
TINY_HEADS = {"heads": 4, "decoder_heads": 4}


def infmae_shapes(widths, depths, decoder_width, decoder_depth, channels=3):
    """Name -> shape of a published InfMAE state dict without its position embeddings."""
    w1, w2, w3 = widths
    shapes = {"mask_token": (1, 1, decoder_width), "patch_embed.proj.weight": (w3, channels, 16, 16)}
    shapes["patch_embed.proj.bias"] = (w3,)
    for stage, (width_in, width, side) in enumerate([(channels, w1, 4), (w1, w2, 2), (w2, w3, 2)], start=1):
        shapes[f"patch_embed{stage}.proj.weight"] = (width, width_in, side, side)
        shapes |= dict.fromkeys(
            [f"patch_embed{stage}.{name}" for name in ("proj.bias", "norm.weight", "norm.bias")], (width,)
        )
    shapes |= {"patch_embed4.weight": (w3, w3), "patch_embed4.bias": (w3,)}
    shapes |= {"stage1_output_decode.weight": (w3, w1, 4, 4), "stage1_output_decode.bias": (w3,)}
    shapes |= {"stage2_output_decode.weight": (w3, w2, 2, 2), "stage2_output_decode.bias": (w3,)}
    for stage, (depth, width) in enumerate([(depths[0], w1), (depths[1], w2)], start=1):
        for index in range(depth):
            shapes |= conv_block_shapes(f"blocks{stage}.{index}", width)
    for index in range(depths[2]):
        shapes |= transformer_block_shapes(f"blocks3.{index}", w3)
    return shapes | head_shapes(w3, decoder_width, decoder_depth, channels)


def mae_shapes(widths, depths, decoder_width, decoder_depth, channels=3):
    """Name -> shape of a published MAE (ViT) state dict without its position embeddings."""
    width = widths[-1]
    shapes = {"cls_token": (1, 1, width), "mask_token": (1, 1, decoder_width)}
    shapes |= {"patch_embed.proj.weight": (width, channels, 16, 16), "patch_embed.proj.bias": (width,)}
    for index in range(depths[-1]):
        shapes |= transformer_block_shapes(f"blocks.{index}", width)
    return shapes | head_shapes(width, decoder_width, decoder_depth, channels)


def head_shapes(width, decoder_width, decoder_depth, channels):
    shapes = {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"decoder_embed.weight": (decoder_width, width), "decoder_embed.bias": (decoder_width,)}
    for index in range(decoder_depth):
        shapes |= transformer_block_shapes(f"decoder_blocks.{index}", decoder_width)
    shapes |= {"decoder_norm.weight": (decoder_width,), "decoder_norm.bias": (decoder_width,)}
    pixels = 16 * 16 * channels
    return shapes | {"decoder_pred.weight": (pixels, decoder_width), "decoder_pred.bias": (pixels,)}


def conv_block_shapes(name, width):
    shapes = {
        "norm1.weight": (width,),
        "conv1.weight": (width, width, 1, 1),
        "conv2.weight": (width, width, 1, 1),
        "attn.weight": (width, 1, 5, 5),
        "norm2.weight": (width,),
        "mlp.fc1.weight": (4 * width, width, 1, 1),
        "mlp.fc2.weight": (width, 4 * width, 1, 1),
    }
    return with_biases(name, shapes)


def transformer_block_shapes(name, width):
    shapes = {
        "norm1.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "norm2.weight": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc2.weight": (width, 4 * width),
    }
    return with_biases(name, shapes)


def with_biases(name, shapes):
    biases = {key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items()}
    return {f"{name}.{key}": shape for key, shape in (shapes | biases).items()}


def position_embedding(rows, columns, width):
    """(1, rows*columns, width): half the channels for x, half for y, each the sines and then the cosines."""
    table = np.zeros((1, rows * columns, width), np.float32)
    quarter = width // 4
    for token in range(rows * columns):
        y, x = divmod(token, columns)
        for i in range(quarter):
            omega = 1.0 / 10000 ** (i / quarter)
            for part, angle in ((0, x * omega), (2, y * omega)):
                table[0, token, part * quarter + i] = math.sin(angle)
                table[0, token, (part + 1) * quarter + i] = math.cos(angle)
    return table


def random_state(architecture, mae=False, grid=(14, 14), seed=0):
    """Name -> float32 array of a whole state dict, position embeddings included."""
    rng = np.random.default_rng(seed)
    shapes = (mae_shapes if mae else infmae_shapes)(**architecture)
    state = {name: rng.standard_normal(shape, np.float32) * np.float32(0.05) for name, shape in shapes.items()}
    for name, width in (
        ("pos_embed", architecture["widths"][-1]),
        ("decoder_pos_embed", architecture["decoder_width"]),
    ):
        table = position_embedding(*grid, width)
        state[name] = np.concatenate([np.zeros((1, 1, width), np.float32), table], axis=1) if mae else table
    return state
