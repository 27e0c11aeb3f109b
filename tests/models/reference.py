"""Slow NumPy reference of the whole forward pass in float64, one image at a time, written from the paper's description.

Nothing here is shared with the package: masked patches are computed and masked as published, convolutions are loops
over kernel positions, attention loops over heads. Only the names of parameters are the package's.

Letters: H W pixels, h w tokens, N = h*w, K visible tokens, C channels, D width. Images are (H,W,C).
"""

import math

import numpy as np

PATCH = 16
CONV_EPS, TOKEN_EPS = 1e-5, 1e-6

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x):
    return x * 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))


def layer_norm(x, p, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def strided_convolution(x, p):
    """Convolution whose stride is its kernel's side, no padding."""
    side = p["kernel"].shape[0]
    rows, columns = x.shape[0] // side, x.shape[1] // side
    out = np.zeros((rows, columns, p["kernel"].shape[-1])) + p["bias"]
    for r in range(rows):
        for c in range(columns):
            window = x[r * side : (r + 1) * side, c * side : (c + 1) * side]
            out[r, c] += np.einsum("ijc,ijcd->d", window, p["kernel"])
    return out


def depthwise_convolution(x, p):
    """5 x 5, zero padding, each channel by itself."""
    rows, columns, _ = x.shape
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)))
    out = np.zeros_like(x) + p["bias"]
    for r in range(rows):
        for c in range(columns):
            out[r, c] += (padded[r : r + 5, c : c + 5] * p["kernel"]).sum(axis=(0, 1))
    return out


def mlp(x, p):
    return linear(gelu(linear(x, p["fc1"])), p["fc2"])


def conv_block(x, p, visible):
    y = linear(layer_norm(x, p["norm1"], CONV_EPS), p["conv1"])
    if visible is not None:
        y = y * visible[:, :, None]
    x = x + linear(depthwise_convolution(y, p["dwconv"]), p["conv2"])
    return x + mlp(layer_norm(x, p["norm2"], CONV_EPS), p["mlp"])


def attention(x, p, heads):
    width = x.shape[-1]
    size = width // heads
    qkv = linear(x, p["qkv"])
    outputs = []
    for head in range(heads):
        q, k, v = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
        weights = np.exp(q @ k.T / math.sqrt(size))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    return linear(np.concatenate(outputs, axis=1), p["proj"])


def transformer_block(x, p, heads):
    x = x + attention(layer_norm(x, p["norm1"], TOKEN_EPS), p["attn"], heads)
    return x + mlp(layer_norm(x, p["norm2"], TOKEN_EPS), p["mlp"])


def positions(h, w, width):
    """Row-major tokens: half the channels encode x, half y; each half sines, then cosines."""
    out = np.zeros((h * w, width))
    quarter = width // 4
    for token in range(h * w):
        y, x = divmod(token, w)
        for i in range(quarter):
            omega = 1.0 / 10000.0 ** (i / quarter)
            out[token, i], out[token, quarter + i] = math.sin(x * omega), math.cos(x * omega)
            out[token, 2 * quarter + i], out[token, 3 * quarter + i] = math.sin(y * omega), math.cos(y * omega)
    return out


def visibility(ids_keep, h, w, cells):
    """(h*cells, w*cells): 1 at the cells of visible patches, 0 elsewhere; None when nothing is masked."""
    if ids_keep is None:
        return None
    mask = np.zeros(h * w)
    mask[ids_keep] = 1.0
    return np.kron(mask.reshape(h, w), np.ones((cells, cells)))


def hybrid_stages(p, image, heads, ids_keep=None, fuse=True):
    """Stages 1 and 2 as maps, and the tokens of stage 3 before the final norm; all tokens where `ids_keep` is None."""
    h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
    maps = []
    x = image
    for stage, cells in ((1, 4), (2, 2)):
        embed = p[f"patch_embed{stage}"]
        x = gelu(layer_norm(strided_convolution(x, embed["proj"]), embed["norm"], CONV_EPS))
        for block in numbered(p, f"blocks{stage}_"):
            x = conv_block(x, block, visibility(ids_keep, h, w, cells))
        maps.append(x)
    embed = p["patch_embed3"]
    x = gelu(layer_norm(strided_convolution(x, embed["proj"]), embed["norm"], CONV_EPS))
    tokens = linear(x.reshape(h * w, -1), p["patch_embed4"])
    tokens = tokens + positions(h, w, tokens.shape[1])
    kept = slice(None) if ids_keep is None else ids_keep
    tokens = tokens[kept]
    for block in numbered(p, "blocks3_"):
        tokens = transformer_block(tokens, block, heads)
    for stage, cells in zip((1, 2), maps if fuse else (), strict=fuse):
        embedded = strided_convolution(cells, p[f"stage{stage}_output_decode"])
        tokens = tokens + embedded.reshape(h * w, -1)[kept]
    return maps[0], maps[1], tokens


def vit_tokens(p, image, heads, ids_keep=None):
    """Class token, then the visible tokens (all where `ids_keep` is None), before the final norm."""
    h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
    tokens = strided_convolution(image, p["patch_embed"]).reshape(h * w, -1)
    tokens = tokens + positions(h, w, tokens.shape[1])
    tokens = tokens if ids_keep is None else tokens[ids_keep]
    tokens = np.concatenate([p["cls_token"][0], tokens])
    for block in numbered(p, "blocks_"):
        tokens = transformer_block(tokens, block, heads)
    return tokens


def final_norm(p, tokens):
    return layer_norm(tokens, p["norm"], TOKEN_EPS)


def decode(p, latent, ids_keep, h, w, heads):
    """(N, P) predicted pixels. Rows of `latent` before the K visible ones are a class token."""
    embedded = linear(latent, p["embed"])
    first = len(embedded) - len(ids_keep)
    tokens = np.repeat(p["mask_token"][0], h * w, axis=0)
    for row, token in enumerate(ids_keep):
        tokens[token] = embedded[first + row]
    tokens = np.concatenate([embedded[:first], tokens + positions(h, w, tokens.shape[1])])
    for block in numbered(p, "blocks_"):
        tokens = transformer_block(tokens, block, heads)
    return linear(layer_norm(tokens, p["norm"], TOKEN_EPS), p["pred"])[first:]


def target_patches(image):
    """(N, P): pixels of each patch in the order row, column, channel."""
    h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
    return np.stack(
        [
            image[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].reshape(-1)
            for r in range(h)
            for c in range(w)
        ]
    )


def masked_error(pred, image, ids_keep, norm_pix):
    """Sum over masked patches of the mean squared error, and their number."""
    target = target_patches(image)
    if norm_pix:
        mean = target.mean(axis=1, keepdims=True)
        variance = ((target - mean) ** 2).sum(axis=1, keepdims=True) / (target.shape[1] - 1)
        target = (target - mean) / np.sqrt(variance + 1e-6)
    masked = [token for token in range(len(target)) if token not in set(ids_keep.tolist())]
    return ((pred[masked] - target[masked]) ** 2).mean(axis=1).sum(), len(masked)


def forward(params, config, images, ids_keep):
    """Latent, predictions and loss of a batch (B,H,W,C), (B,K), in the package's shapes."""
    params = as_float64(params)
    latents, preds, errors, count = [], [], 0.0, 0
    for image, kept in zip(np.asarray(images, np.float64), np.asarray(ids_keep), strict=True):
        h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
        if config.encoder.kind == "hybrid":
            tokens = hybrid_stages(params["encoder"], image, config.encoder.heads, kept)[2]
        else:
            tokens = vit_tokens(params["encoder"], image, config.encoder.heads, kept)
        latents.append(final_norm(params["encoder"], tokens))
        preds.append(decode(params["decoder"], latents[-1], kept, h, w, config.decoder.heads))
        error, masked = masked_error(preds[-1], image, kept, config.norm_pix_loss)
        errors, count = errors + error, count + masked
    return np.stack(latents), np.stack(preds), errors / count


def features(params, config, images, fuse=False):
    """What `features` returns, for a batch (B,H,W,C); `fuse` adds the embedded stages 1 and 2 to the tokens."""
    p = as_float64(params)["encoder"]
    out = []
    for image in np.asarray(images, np.float64):
        h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
        if config.encoder.kind == "hybrid":
            stage1, stage2, tokens = hybrid_stages(p, image, config.encoder.heads, fuse=fuse)
            one = {"stage1": stage1, "stage2": stage2, "pooled": final_norm(p, tokens).mean(axis=0)}
        else:
            tokens = vit_tokens(p, image, config.encoder.heads)
            normed = final_norm(p, tokens)
            one, tokens = {"tokens": normed, "pooled": normed[1:].mean(axis=0)}, tokens[1:]
        out.append(one | {"stage3": tokens.reshape(h, w, -1)})
    return {name: np.stack([one[name] for one in out]) for name in out[0]}


def numbered(p, prefix):
    """The blocks `prefix0`, `prefix1`, … in order."""
    return [p[f"{prefix}{index}"] for index in range(sum(name.startswith(prefix) for name in p))]


def as_float64(tree):
    if isinstance(tree, dict):
        return {key: as_float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)
