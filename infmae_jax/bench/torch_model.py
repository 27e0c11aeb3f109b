"""The published way to compute, in PyTorch: what the benchmarks compare with. Nothing else imports this module.

Written for the benchmarks alone, from the publication's description of the architecture (InfMAE, sections 3.2 and 3.3):
every patch of the convolution stages is computed and masked ones are multiplied by zero, the decoder predicts every
patch. Weights carry the names of published state dicts, so `interop.names` converts our parameters.

Shape letters as in `infmae_jax.models`, but maps are channels first, (B,C,H,W), as PyTorch's convolutions take them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from data_pipelines.errors import InputError
from infmae_jax.interop import names
from infmae_jax.models.blocks import CONV_EPS, TOKEN_EPS
from infmae_jax.models.config import DecoderConfig, EncoderConfig, InfMAEConfig
from infmae_jax.models.patches import PATCH, PIXEL_MEAN, PIXEL_STD, position_embedding
from infmae_jax.training.config import OptimizerConfig

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    raise InputError("comparing with PyTorch needs it installed: pip install torch") from error


class TorchInfMAE:
    """The masked autoencoder of `config` (hybrid encoder only) for images of one size; a call gives its loss.

    Args:
      weights: by published name; they train.
      fused_attention: use PyTorch's fused attention in place of softmax(QK^T)V written out.
    """

    def __init__(
        self,
        config: InfMAEConfig,
        weights: Mapping[str, torch.Tensor],
        image_size: tuple[int, int],
        fused_attention: bool = False,
    ):
        if config.encoder.kind != "hybrid":
            raise InputError(f"model.encoder.kind={config.encoder.kind}: PyTorch is compared with the hybrid one only")
        self.config, self.weights, self.fused = config, weights, fused_attention
        self.grid = (image_size[0] // PATCH, image_size[1] // PATCH)
        widths = (config.encoder.widths[-1], config.decoder.width)
        tables = [torch.from_numpy(position_embedding(self.grid, width))[None].to(device()) for width in widths]
        self.positions, self.decoder_positions = tables

    def parameters(self) -> list[torch.Tensor]:
        return list(self.weights.values())

    def __call__(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) float32 normalised, (B,K) int64 -> () mean squared error over the masked patches."""
        mask = images.new_ones(images.shape[0], self.grid[0] * self.grid[1]).scatter(1, ids_keep, 0.0)
        pred = self.decode(self.encode(images, ids_keep, mask), ids_keep)
        target = self.patchify(images)
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def encode(self, images: torch.Tensor, ids_keep: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """-> (B,K,D), the latent of the visible tokens."""
        visible = (1.0 - mask).reshape(-1, 1, *self.grid)
        stage1, stage2, tokens = self.stages(images, visible)
        tokens = self.transformer("blocks3", self.config.encoder, take(tokens, ids_keep))
        if self.config.encoder.fuse_stages:
            tokens = tokens + take(as_tokens(self.conv("stage1_output_decode", stage1, stride=4)), ids_keep)
            tokens = tokens + take(as_tokens(self.conv("stage2_output_decode", stage2, stride=2)), ids_keep)
        return self.norm("norm", tokens, TOKEN_EPS)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Dense features of whole images: stage1, stage2 (B,C,H,W), stage3 (B,N,D), pooled (B,D)."""
        stage1, stage2, tokens = self.stages(images, None)
        tokens = self.transformer("blocks3", self.config.encoder, tokens)
        pooled = self.norm("norm", tokens, TOKEN_EPS).mean(dim=1)
        return {"stage1": stage1, "stage2": stage2, "stage3": tokens, "pooled": pooled}

    def stages(self, images: torch.Tensor, visible: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Stages 1 and 2, and the tokens of every patch before the transformer; `visible` is (B,1,h,w) or None."""
        maps, x = [], images
        for stage, (patch, cells) in enumerate(((4, 4), (2, 2)), start=1):
            x = self.patch_embed(stage, x, patch)
            shown = None if visible is None else visible.repeat_interleave(cells, 2).repeat_interleave(cells, 3)
            for index in range(self.config.encoder.depths[stage - 1]):
                x = self.conv_block(f"blocks{stage}.{index}", x, shown)
            maps.append(x)
        tokens = self.linear("patch_embed4", as_tokens(self.patch_embed(3, x, 2)))
        return *maps, tokens + self.positions

    def decode(self, latent: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """(B,K,D), (B,K) -> (B,N,P)."""
        embedded = self.linear("decoder_embed", latent)
        n, width = self.grid[0] * self.grid[1], embedded.shape[-1]
        tokens = self.weights["mask_token"].to(embedded.dtype).expand(len(embedded), n, -1)
        tokens = tokens.scatter(1, ids_keep[..., None].expand(-1, -1, width), embedded) + self.decoder_positions
        tokens = self.transformer("decoder_blocks", self.config.decoder, tokens)
        return self.linear("decoder_pred", self.norm("decoder_norm", tokens, TOKEN_EPS))

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,N,P): row, column, channel."""
        (h, w), channels = self.grid, images.shape[1]
        cut = images.reshape(-1, channels, h, PATCH, w, PATCH)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, PATCH**2 * channels)

    def patch_embed(self, stage: int, x: torch.Tensor, patch: int) -> torch.Tensor:
        """Non-overlapping convolution, LayerNorm, exact GELU: (B,C,H,W) -> (B,width,H/patch,W/patch)."""
        x = self.conv(f"patch_embed{stage}.proj", x, stride=patch)
        return F.gelu(self.channel_norm(f"patch_embed{stage}.norm", x))

    def conv_block(self, name: str, x: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """x + conv1x1(dwconv5x5(m * conv1x1(LN(x)))), then x + MLP(LN(x)); `attn` is the published name of the dwconv.

        visible: (B,1,H,W), 1 where a cell is visible, 0 where masked; None: no mask."""
        y = self.conv(f"{name}.conv1", self.channel_norm(f"{name}.norm1", x))
        y = y if visible is None else y * visible
        x = x + self.conv(f"{name}.conv2", self.conv(f"{name}.attn", y, padding=2, groups=y.shape[1]))
        y = F.gelu(self.conv(f"{name}.mlp.fc1", self.channel_norm(f"{name}.norm2", x)))
        return x + self.conv(f"{name}.mlp.fc2", y)

    def transformer(self, name: str, part: EncoderConfig | DecoderConfig, x: torch.Tensor) -> torch.Tensor:
        """Pre-norm transformer blocks: (B,N,D) -> (B,N,D)."""
        depth = part.depth if isinstance(part, DecoderConfig) else part.depths[-1]
        for block in (f"{name}.{index}" for index in range(depth)):
            x = x + self.attention(f"{block}.attn", self.norm(f"{block}.norm1", x, TOKEN_EPS), part.heads)
            y = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, TOKEN_EPS)))
            x = x + self.linear(f"{block}.mlp.fc2", y)
        return x

    def attention(self, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
        batch, n, width = x.shape
        qkv = self.linear(f"{name}.qkv", x).reshape(batch, n, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1) @ v
        return self.linear(f"{name}.proj", out.transpose(1, 2).reshape(batch, n, width))

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def conv(self, name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def norm(self, name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], epsilon)

    def channel_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """LayerNorm over the channels of a map (B,C,H,W)."""
        return self.norm(name, x.permute(0, 2, 3, 1), CONV_EPS).permute(0, 3, 1, 2)


def as_tokens(cells: torch.Tensor) -> torch.Tensor:
    """(B,D,h,w) -> (B,N,D)."""
    return cells.flatten(2).transpose(1, 2)


def take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B,N,D), (B,K) -> (B,K,D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def from_params(
    config: InfMAEConfig, params: Any, image_size: tuple[int, int], fused_attention: bool = False
) -> TorchInfMAE:
    """The PyTorch model with our parameters (a tree as `InfMAE.init` makes it), on the accelerator if there is one."""
    flat = traverse_util.flatten_dict(params)
    weights = {}
    for entry in names.table(config):
        array = np.array(entry.publish(np.asarray(flat[entry.path], np.float32)))
        weights[entry.name] = torch.from_numpy(array).to(device()).requires_grad_()
    return TorchInfMAE(config, weights, image_size, fused_attention)


def settings() -> dict[str, Any]:
    """What a comparison should say of PyTorch."""
    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str) -> torch.autocast:
    """Mixed precision for the compute dtype "bfloat16", nothing for "float32"."""
    return torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bfloat16")


def batch(images: np.ndarray, ids_keep: np.ndarray, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Our batch as pipelines for colour photographs deliver it, on the device.

    Args:
      images: (B,H,W,1) uint8.
      ids_keep: (B,K) int32.

    Returns:
      (B,channels,H,W) float32 normalised, contiguous; (B,K) int64.
    """
    pixels = torch.from_numpy(images).to(device()).float().permute(0, 3, 1, 2).expand(-1, channels, -1, -1)
    return ((pixels / 255.0 - PIXEL_MEAN) / PIXEL_STD).contiguous(), torch.from_numpy(ids_keep).to(device()).long()


def train_call(
    model: TorchInfMAE,
    config: OptimizerConfig,
    learning_rate: float,
    inputs: tuple[torch.Tensor, torch.Tensor],
    compiled: bool = False,
) -> Callable[[int], float]:
    """Makes so many AdamW updates on (images, ids_keep), in the model's compute dtype; returns the loss of the last.

    Args:
      compiled: through torch.compile, with the fused form of AdamW: the strongest form a user would pick.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas, fused = (config.b1, config.b2), True if compiled else None
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
    forward = torch.compile(model.__call__) if compiled else model

    def call(times: int) -> float:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            with autocast(model.config.encoder.dtype):
                loss = forward(*inputs)
            loss.backward()
            if config.clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
        return loss.item()  # which waits for the device

    return call


def feature_call(model: TorchInfMAE, images: np.ndarray) -> Callable[[int], np.ndarray]:
    """Computes dense features of (B,H,W,1) uint8 images so many times; returns pooled, (B,D) float32."""
    inputs, _ = batch(images, np.zeros((1, 1), np.int32), model.config.encoder.in_channels)

    @torch.inference_mode()
    def call(times: int) -> np.ndarray:
        for _ in range(times):
            with autocast(model.config.encoder.dtype):
                out = model.features(inputs)
        return out["pooled"].float().cpu().numpy()  # which waits for the device

    return call
