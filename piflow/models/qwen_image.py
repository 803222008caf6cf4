"""Students on diffusers' Qwen-Image transformer."""

from __future__ import annotations

from typing import Literal

from diffusers import QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config

from piflow.models.heads import PackedDXHead, PackedGMHead, widened

# The base's __init__ without the decorator that would register its configuration over the student's.
_init_base = QwenImageTransformer2DModel.__init__.__wrapped__


class GMQwenImageTransformer2DModel(PackedGMHead, QwenImageTransformer2DModel):
    """Qwen-Image with a GMFlow head, under the published parameter names and configuration keys."""

    @register_to_config
    def __init__(
        self,
        num_gaussians: int = 8,
        constant_logstd: float | None = None,
        logstd_inner_dim: int = 1024,
        gm_num_logstd_layers: int = 2,
        logweights_channels: int = 4,
        in_channels: int = 64,
        out_channels: int | None = 64,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        out_channels = out_channels or in_channels
        self.register_to_config(out_channels=out_channels)
        _init_base(
            self,
            patch_size=1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            axes_dims_rope=axes_dims_rope,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        self.install_head()


class DXQwenImageTransformer2DModel(PackedDXHead, QwenImageTransformer2DModel):
    """Qwen-Image with a DX head: `proj_out` predicts N velocities, or polynomial coefficients, for each channel."""

    @register_to_config
    def __init__(
        self,
        n_grid: int | None = None,
        policy: Literal["grid", "polynomial"] = "grid",
        shift: float | None = None,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        out_channels, n_grid = widened(in_channels, out_channels, n_grid)
        self.register_to_config(out_channels=out_channels, n_grid=n_grid, patch_size=1)
        _init_base(
            self,
            patch_size=1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        self.install_head()
