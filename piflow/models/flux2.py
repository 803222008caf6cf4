"""Students on diffusers' FLUX.2 transformer, whose own linear layers have no biases."""

from __future__ import annotations

from typing import Literal

from diffusers import Flux2Transformer2DModel
from diffusers.configuration_utils import register_to_config

from piflow.models.heads import PackedDXHead, PackedGMHead, widened

# The base's __init__ without the decorator that would register its configuration over the student's.
_init_base = Flux2Transformer2DModel.__init__.__wrapped__


class GMFlux2Transformer2DModel(PackedGMHead, Flux2Transformer2DModel):
    """FLUX.2 with a GMFlow head, under the published parameter names and configuration keys."""

    @register_to_config
    def __init__(
        self,
        num_gaussians: int = 8,
        constant_logstd: float | None = None,
        logstd_inner_dim: int = 1024,
        gm_num_logstd_layers: int = 2,
        logweights_channels: int = 4,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 48,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        joint_attention_dim: int = 15360,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = True,
    ) -> None:
        out_channels = out_channels or in_channels
        self.register_to_config(out_channels=out_channels)
        _init_base(
            self,
            patch_size=1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            timestep_guidance_channels=timestep_guidance_channels,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=axes_dims_rope,
            rope_theta=rope_theta,
            eps=eps,
            guidance_embeds=guidance_embeds,
        )
        self.install_head()


class DXFlux2Transformer2DModel(PackedDXHead, Flux2Transformer2DModel):
    """FLUX.2 with a DX head: `proj_out` predicts N velocities, or polynomial coefficients, for each channel."""

    @register_to_config
    def __init__(
        self,
        n_grid: int | None = None,
        policy: Literal["grid", "polynomial"] = "grid",
        shift: float | None = None,
        patch_size: int = 1,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 48,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        joint_attention_dim: int = 15360,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = True,
    ) -> None:
        out_channels, n_grid = widened(in_channels, out_channels, n_grid)
        self.register_to_config(out_channels=out_channels, n_grid=n_grid, patch_size=1)
        _init_base(
            self,
            patch_size=1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            timestep_guidance_channels=timestep_guidance_channels,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=axes_dims_rope,
            rope_theta=rope_theta,
            eps=eps,
            guidance_embeds=guidance_embeds,
        )
        self.install_head()
