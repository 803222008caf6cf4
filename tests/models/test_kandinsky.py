"""Kandinsky 6 students: the layout that PiflowScheduler takes, the start at the teacher, saving, bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import Kandinsky6SRTransformer3DModel, Kandinsky6Transformer3DModel, PiflowScheduler

from piflow.models import DXKandinsky6SRTransformer3DModel, DXKandinsky6Transformer3DModel
from piflow.policies import DXPolicy
from piflow.schedulers import FusedPiflowScheduler
from tests.models.networks import noise

CHANNELS, AUDIO_CHANNELS, N_GRID = 4, 3, 5


def teacher() -> Kandinsky6Transformer3DModel:
    torch.manual_seed(0)
    return Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_audio_dim=AUDIO_CHANNELS,
        out_audio_dim=AUDIO_CHANNELS,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        patch_size=(1, 2, 2),
    ).eval()


def sr_teacher() -> Kandinsky6SRTransformer3DModel:
    torch.manual_seed(0)
    return Kandinsky6SRTransformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
    ).eval()


def arguments(latents: torch.Tensor, audio: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
    """With conditioning latents and mask beside the noisy latents."""
    batch = len(latents)
    conditioning = torch.zeros(*latents.shape[:-1], CHANNELS + 1)
    return {
        "hidden_states": torch.cat([latents, conditioning], dim=-1),
        "audio_hidden_states": audio,
        "encoder_hidden_states": noise(batch, 5, 12, seed=2),
        "pooled_projections": noise(batch, 8, seed=3),
        "timestep": timestep.expand(batch),
        "return_dict": False,
    }


@pytest.mark.parametrize("scheduler_class", [PiflowScheduler, FusedPiflowScheduler])
def test_schedulers_take_the_output(scheduler_class: type[PiflowScheduler]) -> None:
    """Video and audio in a few steps; a student that has just started is the teacher along x_0 held for a segment."""
    base = teacher()
    student = DXKandinsky6Transformer3DModel.from_teacher(base, N_GRID, shift=5.0)
    scheduler = scheduler_class(shift=student.config.shift, n_grid=student.config.n_grid)
    audio_scheduler = scheduler_class(shift=student.config.shift, n_grid=student.config.n_grid)
    latents, audio = noise(2, 2, 4, 4, CHANNELS), noise(2, 6, AUDIO_CHANNELS, seed=1)
    scheduler.set_timesteps(2)
    audio_scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        with torch.no_grad():
            video_out, audio_out = student(**arguments(latents, audio, t))
            video_velocity, audio_velocity = base(**arguments(latents, audio, t))
        assert video_out.shape == (2, 2, 4, 4, N_GRID * CHANNELS)
        assert audio_out.shape == (2, 6, N_GRID * AUDIO_CHANNELS)
        index = list(scheduler.timesteps).index(t)
        sigma, sigma_next = scheduler.sigmas[index : index + 2]
        moved = []
        for each, x, out, velocity in (
            (scheduler, latents, video_out, video_velocity),
            (audio_scheduler, audio, audio_out, audio_velocity),
        ):
            expected = x + (sigma_next - sigma) * velocity  # x_0 held: the flow is a straight line
            moved.append(each.step(out, t, x, return_dict=False)[0])
            torch.testing.assert_close(moved[-1], expected, rtol=0, atol=1e-3 if sigma_next == 0 else 2e-5)
        latents, audio = moved


def test_policy_starts_at_the_teachers_velocity() -> None:
    base = teacher()
    student = DXKandinsky6Transformer3DModel.from_teacher(base, N_GRID)
    latents, audio, sigma = noise(2, 2, 4, 4, CHANNELS), noise(2, 6, AUDIO_CHANNELS, seed=1), torch.tensor([0.8, 0.8])
    with torch.no_grad():
        outputs = student(**arguments(latents, audio, 1000 * sigma))
        velocities = base(**arguments(latents, audio, 1000 * sigma))
    for x, output, velocity in zip((latents, audio), outputs, velocities):
        grid = output.unflatten(-1, (N_GRID, -1)).movedim((-2, -1), (1, 2))
        x_src = x.movedim(-1, 1)
        policy = DXPolicy(grid, x_src, sigma, segment_size=0.25, shift=5.0)
        torch.testing.assert_close(policy.velocity(x_src, sigma).movedim(1, -1), velocity, rtol=0, atol=2e-6)


@pytest.mark.parametrize("share", [False, True])
def test_round_trip(share: bool, tmp_path) -> None:
    base = teacher()
    student = DXKandinsky6Transformer3DModel.from_teacher(base, N_GRID, shift=5.0, share=share)
    assert (student.visual_embeddings is base.visual_embeddings) == share
    assert base.out_layer.out_layer.out_features == 16
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_grid"], config["shift"], config["out_visual_dim"], config["out_audio_dim"]) == (5, 5.0, 20, 15)
    again = DXKandinsky6Transformer3DModel.from_pretrained(tmp_path)
    given = arguments(noise(1, 1, 4, 4, CHANNELS), noise(1, 6, AUDIO_CHANNELS), torch.tensor(500.0))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(student(**given), again(**given)))

    config.pop("n_grid")  # as published, without the student's own keys
    config.pop("shift")
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Kandinsky6Transformer3DModel"}))
    assert DXKandinsky6Transformer3DModel.from_pretrained(tmp_path).config.n_grid == N_GRID
    plain = Kandinsky6Transformer3DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(student(**given), plain(**given)))


def test_super_resolution_head() -> None:
    """Uncompiled, its flex attention holds every score of a video in memory: the output layer runs by itself here."""
    base = sr_teacher()
    student = DXKandinsky6SRTransformer3DModel.from_teacher(base, N_GRID, shift=5.0)
    assert (student.config.n_grid, student.config.out_visual_dim) == (N_GRID, N_GRID * CHANNELS)
    tokens, conditioning = noise(1, 2, 4, 4, 24), noise(1, 16, seed=1)
    with torch.no_grad():
        wide, velocity = student.out_layer(tokens, conditioning), base.out_layer(tokens, conditioning)
    grid = wide.unflatten(-1, (N_GRID, -1))
    torch.testing.assert_close(grid, velocity.unsqueeze(-2).expand_as(grid), rtol=0, atol=1e-6)
    assert DXKandinsky6SRTransformer3DModel.from_config(student.config).config.n_grid == N_GRID


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="n_grid: expected a whole number, at least 1, got 0"):
        DXKandinsky6Transformer3DModel.from_teacher(teacher(), 0)
    with pytest.raises(
        ValueError, match=r"expected a Kandinsky6Transformer3DModel.* got a Kandinsky6SRTransformer3DModel"
    ):
        DXKandinsky6Transformer3DModel.from_teacher(sr_teacher())
    config = {**teacher().config, "n_grid": 5, "out_visual_dim": 20}
    with pytest.raises(ValueError, match=r"out_audio_dim: expected n_grid x in_audio_dim = 5 x 3, got 3"):
        DXKandinsky6Transformer3DModel.from_config(config)
