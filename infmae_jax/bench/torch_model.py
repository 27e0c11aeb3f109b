"""The published way to compute, in PyTorch: what the benchmarks compare with. Nothing else imports this module.

Written for the benchmarks alone, from the publication's description of the architecture (InfMAE, sections 3.2 and 3.3):
every patch of the convolution stages is computed and masked ones are multiplied by zero, the decoder predicts every
patch. Modules carry the names of published state dicts, so `interop.names` converts our parameters.

Shape letters as in `infmae_jax.models`, but maps are channels first, (B,C,H,W), as PyTorch's convolutions take them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util

from data_pipelines.errors import InputError
from infmae_jax.interop import names
from infmae_jax.models.blocks import CONV_EPS, TOKEN_EPS
from infmae_jax.models.config import InfMAEConfig
from infmae_jax.models.patches import PATCH, PIXEL_MEAN, PIXEL_STD, position_embedding
from infmae_jax.training.config import OptimizerConfig

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise InputError("comparing with PyTorch needs it installed: pip install torch") from error


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B,C,H,W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Non-overlapping convolution, LayerNorm, exact GELU: (B,C,H,W) -> (B,width,H/patch,W/patch)."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = ChannelNorm(width, eps=CONV_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.norm(self.proj(x)))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between; `layer` makes one: of tokens, or of maps (a 1 x 1 convolution)."""

    def __init__(self, width: int, hidden: int, layer: Callable[[int, int], nn.Module] = nn.Linear):
        super().__init__()
        self.fc1 = layer(width, hidden)
        self.fc2 = layer(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    """x + conv1x1(dwconv5x5(m * conv1x1(LN(x)))), then x + MLP(LN(x)); `attn` is the published name of the dwconv."""

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = ChannelNorm(width, eps=CONV_EPS)
        self.conv1 = nn.Conv2d(width, width, 1)
        self.attn = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.norm2 = ChannelNorm(width, eps=CONV_EPS)
        self.mlp = Mlp(width, width * mlp_ratio, functools.partial(nn.Conv2d, kernel_size=1))

    def forward(self, x: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """visible: (B,1,H,W), 1 where a cell is visible, 0 where masked; None: no mask."""
        y = self.conv1(self.norm1(x))
        y = y if visible is None else y * visible
        x = x + self.conv2(self.attn(y))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention: written out, or PyTorch's fused kernels where `fused`."""

    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, n, width = x.shape
        qkv = self.qkv(x).reshape(batch, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
            out = weights @ v
        return self.proj(out.transpose(1, 2).reshape(batch, n, width))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: (B,N,D) -> (B,N,D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.attn = Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.mlp = Mlp(width, width * mlp_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TorchInfMAE(nn.Module):
    """The masked autoencoder of `config` (hybrid encoder only) for images of one size.

    Args:
      fused_attention: use PyTorch's fused attention in place of softmax(QK^T)V written out.
    """

    def __init__(self, config: InfMAEConfig, image_size: tuple[int, int], fused_attention: bool = False):
        super().__init__()
        if config.encoder.kind != "hybrid":
            raise InputError(f"model.encoder.kind={config.encoder.kind}: PyTorch is compared with the hybrid one only")
        self.config = config
        self.grid = (image_size[0] // PATCH, image_size[1] // PATCH)
        width1, width2, width3 = config.encoder.widths
        ratio, inner = config.encoder.mlp_ratio, config.decoder.width
        self.patch_embed1 = PatchEmbed(config.encoder.in_channels, width1, 4)
        self.patch_embed2 = PatchEmbed(width1, width2, 2)
        self.patch_embed3 = PatchEmbed(width2, width3, 2)
        self.patch_embed4 = nn.Linear(width3, width3)
        self.blocks1 = nn.ModuleList(ConvBlock(width1, ratio) for _ in range(config.encoder.depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(width2, ratio) for _ in range(config.encoder.depths[1]))
        self.blocks3 = nn.ModuleList(
            TransformerBlock(width3, config.encoder.heads, ratio, fused_attention)
            for _ in range(config.encoder.depths[2])
        )
        if config.encoder.fuse_stages:
            self.stage1_output_decode = nn.Conv2d(width1, width3, 4, stride=4)
            self.stage2_output_decode = nn.Conv2d(width2, width3, 2, stride=2)
        self.norm = nn.LayerNorm(width3, eps=TOKEN_EPS)
        self.decoder_embed = nn.Linear(width3, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(inner, config.decoder.heads, ratio, fused_attention) for _ in range(config.decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=TOKEN_EPS)
        self.decoder_pred = nn.Linear(inner, PATCH**2 * config.encoder.in_channels)
        for name, channels in (("positions", width3), ("decoder_positions", inner)):
            table = torch.from_numpy(position_embedding(self.grid, channels))[None]
            self.register_buffer(name, table, persistent=False)

    def forward(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
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
        tokens = take(tokens, ids_keep)
        for block in self.blocks3:
            tokens = block(tokens)
        if self.config.encoder.fuse_stages:
            tokens = tokens + take(as_tokens(self.stage1_output_decode(stage1)), ids_keep)
            tokens = tokens + take(as_tokens(self.stage2_output_decode(stage2)), ids_keep)
        return self.norm(tokens)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Dense features of whole images: stage1, stage2 (B,C,H,W), stage3 (B,N,D), pooled (B,D)."""
        stage1, stage2, tokens = self.stages(images, None)
        for block in self.blocks3:
            tokens = block(tokens)
        return {"stage1": stage1, "stage2": stage2, "stage3": tokens, "pooled": self.norm(tokens).mean(dim=1)}

    def stages(self, images: torch.Tensor, visible: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Stages 1 and 2, and the tokens of every patch before the transformer; `visible` is (B,1,h,w) or None."""
        maps, x = [], images
        for embed, blocks, cells in (
            (self.patch_embed1, self.blocks1, 4),
            (self.patch_embed2, self.blocks2, 2),
        ):
            x = embed(x)
            shown = None if visible is None else visible.repeat_interleave(cells, 2).repeat_interleave(cells, 3)
            for block in blocks:
                x = block(x, shown)
            maps.append(x)
        return *maps, self.patch_embed4(as_tokens(self.patch_embed3(x))) + self.positions

    def decode(self, latent: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """(B,K,D), (B,K) -> (B,N,P)."""
        embedded = self.decoder_embed(latent)
        n, width = self.grid[0] * self.grid[1], embedded.shape[-1]
        tokens = self.mask_token.to(embedded.dtype).expand(len(embedded), n, -1)
        tokens = tokens.scatter(1, ids_keep[..., None].expand(-1, -1, width), embedded) + self.decoder_positions
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,N,P): row, column, channel."""
        (h, w), channels = self.grid, images.shape[1]
        cut = images.reshape(-1, channels, h, PATCH, w, PATCH)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, PATCH**2 * channels)


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
    model = TorchInfMAE(config, image_size, fused_attention)
    flat = traverse_util.flatten_dict(params)
    state = {
        entry.name: torch.from_numpy(np.array(entry.layout.publish(np.asarray(flat[entry.path], np.float32))))
        for entry in names.table(config)
    }
    model.load_state_dict(state)
    return model.to(device())


def settings() -> dict[str, Any]:
    """What a comparison should say of PyTorch."""
    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision for the compute dtype "bfloat16", nothing for "float32"."""
    return torch.autocast(device().type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


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


def make_train_step(
    model: TorchInfMAE, config: OptimizerConfig, learning_rate: Callable[[int], float], compiled: bool = False
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One AdamW update a call, (images, ids_keep) -> loss, in the model's compute dtype.

    Args:
      learning_rate: of the update with this number, from 0.
      compiled: through torch.compile, with the fused form of AdamW: the strongest form a user would pick.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), fused=True if compiled else None)
    forward = torch.compile(model) if compiled else model
    updates = 0

    def step(images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        nonlocal updates
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(updates)
        updates += 1
        optimizer.zero_grad(set_to_none=True)
        with autocast(model.config.encoder.dtype):
            loss = forward(images, ids_keep)
        loss.backward()
        if config.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        return loss.detach()

    return step


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
