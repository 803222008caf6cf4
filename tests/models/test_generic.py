"""Heads on transformers without a student class of their own: how their outputs lie, what fits them and what not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    LTXVideoTransformer3DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

import piflow.models
from piflow.models import student_class
from piflow.policies import DXPolicy, GMFlowPolicy
from tests.models import networks
from tests.models.networks import HEADS, SIGMA, noise

IMAGE, VIDEO, TOKENS = noise(2, 4, 8, 8), noise(2, 4, 1, 8, 8), noise(2, 12, 16)
TEXT = noise(2, 5, 24, seed=1)


def sana() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    teacher = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=2,
        **HEADS,
    )
    return teacher, {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": 1000 * SIGMA}, IMAGE, {}


def aura_flow() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    teacher = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=16,
        **HEADS,
    )
    return teacher, {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": SIGMA}, IMAGE, {}


def z_image() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    """Lists in, lists out, no out_channels to configure, and x_0 - noise for a velocity."""
    teacher = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    nn.init.normal_(teacher.x_pad_token)
    arguments = {"x": list(VIDEO), "t": 1 - SIGMA, "cap_feats": list(TEXT)}
    return teacher, arguments, VIDEO, {"output_layer": "all_final_layer.2-1.linear", "velocity_scale": -1.0}


def cog_view4() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    teacher = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
        **HEADS,
    )
    size = torch.tensor([[64.0, 64.0]] * 2)
    arguments = {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": 1000 * SIGMA}
    arguments |= {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2)}
    return teacher, arguments, IMAGE, {"channels_first": True}


def wan() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    teacher = WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32, **HEADS
    )
    return teacher, {"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": 1000 * SIGMA}, VIDEO, {}


def chroma() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    """Packed tokens, as FLUX.1, but another `norm_out`."""
    teacher = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    arguments = {"hidden_states": TOKENS, "encoder_hidden_states": TEXT, "timestep": SIGMA}
    arguments |= {"img_ids": networks.ids(3), "txt_ids": torch.zeros(5, 3)}
    return teacher, arguments, TOKENS, {"layout": "packed", "logweights_channels": 4}


def ltx() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    """Packed tokens of one pixel."""
    teacher = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        cross_attention_dim=32,
        caption_channels=24,
        **HEADS,
    )
    arguments = {"hidden_states": TOKENS, "encoder_hidden_states": TEXT, "timestep": 1000 * SIGMA}
    arguments |= {"encoder_attention_mask": torch.ones(2, 5), "num_frames": 1, "height": 4, "width": 3}
    return teacher, arguments, TOKENS, {"layout": "packed"}


def sd3() -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Any]]:
    return networks.sd3(), networks.ARGUMENTS["sd3"], networks.ARGUMENTS["sd3"]["hidden_states"], {}


FAMILIES = [sd3, sana, aura_flow, z_image, cog_view4, wan, chroma, ltx]


@pytest.mark.parametrize("mode", ["GM", "GM, constant logstd", "grid", "polynomial"])
@pytest.mark.parametrize("family", FAMILIES)
def test_start_and_round_trip(family: Any, mode: str, tmp_path) -> None:
    """The policy's velocity at the source is the teacher's, in latent layout; what is saved is complete."""
    torch.manual_seed(0)
    teacher, arguments, x_src, where = family()
    teacher.eval()
    cls = student_class(type(teacher), "GM" if mode.startswith("GM") else "DX")
    head = {"n_grid": 3, "policy": mode} if not mode.startswith("GM") else {"num_gaussians": 3, "spread": 0.3}
    if mode == "GM, constant logstd":
        head["constant_logstd"] = -2.0
    student = cls.from_teacher(teacher, **head, **where)
    layout = where.get("layout", "spatial")
    with torch.no_grad():
        expected = teacher(**arguments, return_dict=False)[0]
        expected = torch.stack(expected) if isinstance(expected, list) else expected
        output = student(**arguments)
        if mode.startswith("GM"):
            policy = GMFlowPolicy(*output, x_src, SIGMA, layout=layout)
            assert output.means.std(dim=1 if layout == "spatial" else 2).min() > 1e-3
        else:
            policy = DXPolicy(*output, x_src, SIGMA, segment_size=0.25, shift=3.0, mode=mode, layout=layout)
        velocity = policy.velocity(x_src, SIGMA)
    assert velocity.shape == x_src.shape
    torch.testing.assert_close(velocity, where.get("velocity_scale", 1.0) * expected, rtol=0, atol=5e-6)

    student.save_pretrained(tmp_path)
    name = json.loads((tmp_path / "config.json").read_text())["_class_name"]
    again = getattr(piflow.models, name).from_pretrained(tmp_path)
    assert type(again) is cls
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(output, again(**arguments)))


def test_logstd_is_learnt() -> None:
    student = piflow.models.GMSD3Transformer2DModel.from_teacher(networks.sd3(), 2)
    student(**networks.ARGUMENTS["sd3"]).logstds.sum().backward()
    gradient = student.proj_out.weight.grad.unflatten(0, (4, -1)).abs().sum(dim=(0, 2))  # (sub-pixel, channel)
    assert (gradient > 0).tolist() == [False] * 10 + [True]


def test_output_layer_stays_precise() -> None:
    torch.manual_seed(0)
    teacher, arguments, _, where = z_image()
    student = student_class(type(teacher), "GM").from_teacher(teacher, 2, **where)
    student.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
    assert dtypes["all_final_layer.2-1.linear.weight"] == torch.float32
    assert dtypes["layers.0.attention.to_q.weight"] == torch.float8_e4m3fn
    with torch.no_grad():
        assert student(**arguments).means.isfinite().all()


def test_bad_input_is_named() -> None:
    cls = piflow.models.GMSD3Transformer2DModel
    with pytest.raises(ValueError, match=r"output_layer: expected the path of a SD3Transformer2DModel's last linear "):
        cls.from_teacher(networks.sd3(), output_layer="final_layer")
    with pytest.raises(ValueError, match=r"found AdaLayerNormContinuous under 'norm_out'"):
        cls.from_teacher(networks.sd3(), output_layer="norm_out")
    with pytest.raises(
        ValueError, match=r"velocity_channels: expected a divisor of 16, the outputs of proj_out, got 3"
    ):
        cls.from_teacher(networks.sd3(), velocity_channels=3)
    with pytest.raises(ValueError, match=r"velocity_channels: expected a divisor of 16, .* got None"):
        cls.from_teacher(networks.sd3(), velocity_channels=None)
    with pytest.raises(ValueError, match="policy: expected 'GM' or 'DX', got 'grid'"):
        student_class(type(networks.sd3()), "grid")
    with pytest.raises(ValueError, match="layout: expected 'spatial' or 'packed', got 'tokens'"):
        cls.from_teacher(networks.sd3(), layout="tokens")
    with pytest.raises(ValueError, match="out_channels: expected 16 of this head on 4 velocity_channels, got 4"):
        cls(num_gaussians=3, in_channels=4, out_channels=4)
