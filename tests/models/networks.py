"""Tiny teachers with random weights, and arguments that each of them takes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SIGMA = torch.tensor([0.9, 0.5])
"""Noise levels of the two samples."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qwen(**config: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    config = {"num_layers": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6), **config}
    return QwenImageTransformer2DModel(patch_size=1, in_channels=16, out_channels=16, **HEADS, **config).eval()


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = {"num_layers": 2, "num_single_layers": 1, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
    return FluxTransformer2DModel(
        in_channels=16, pooled_projection_dim=12, guidance_embeds=True, **HEADS, **config
    ).eval()


def flux2() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    config = {"num_layers": 2, "num_single_layers": 1, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)}
    return Flux2Transformer2DModel(
        in_channels=16, timestep_guidance_channels=32, mlp_ratio=2.0, **HEADS, **config
    ).eval()


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=5, **HEADS).eval()


def sd3(**config: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    config = {"sample_size": 8, "pos_embed_max_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, **config}
    dims = {"joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 12}
    return SD3Transformer2DModel(**HEADS, **dims, **config).eval()


def ids(axes: int, height: int = 4, width: int = 3) -> Tensor:
    """Position of each token (T, axes): row and column on the second and third axis."""
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    return torch.nn.functional.pad(grid, (1, axes - 3))


TOKENS = {"hidden_states": noise(2, 12, 16), "encoder_hidden_states": noise(2, 5, 24, seed=1), "timestep": SIGMA}
IMAGE = {"hidden_states": noise(2, 4, 8, 8)}
POOLED = {"pooled_projections": noise(2, 12, seed=2)}
GUIDANCE = {"guidance": torch.tensor([3.5, 3.5])}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "qwen": {**TOKENS, "img_shapes": [[(1, 4, 3)]] * 2},
    "flux": {
        **TOKENS,
        **POOLED,
        **GUIDANCE,
        "img_ids": ids(3),
        "txt_ids": torch.zeros(5, 3),
    },
    "flux2": {**TOKENS, **GUIDANCE, "img_ids": ids(4), "txt_ids": torch.zeros(5, 4)},
    "dit": {**IMAGE, "timestep": 1000 * SIGMA, "class_labels": torch.tensor([0, 5])},
    "sd3": {
        **IMAGE,
        **POOLED,
        "encoder_hidden_states": TOKENS["encoder_hidden_states"],
        "timestep": 1000 * SIGMA,
    },
}
