"""The toy on one trajectory, of the digits teacher and of tiny ImageNet and Qwen-Image ones, and the checkerboard."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, QwenImageTransformer2DModel
from torch import Generator
from typer.testing import CliRunner

from benchmarks.paper.checkerboard import (
    checkerboard_velocity,
    draw_data,
    euler,
    run,
    share_inside,
)
from benchmarks.paper.toy import (
    StaticGM,
    Trajectory,
    compare,
    digits_teacher,
    dit_teacher,
    fit,
    follow,
    main,
    qwen_image_teacher,
)
from piflow.cli import app
from piflow.digits.teacher import euler_sample
from piflow.noise_schedule import NoiseSchedule
from tests.data.bases import save_qwen_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits_path() -> Trajectory:
    velocity, shape = digits_teacher(3)
    return follow(velocity, torch.randn(shape, generator=Generator().manual_seed(0)), 64, NoiseSchedule())


def test_the_path_is_the_teachers(digits_path: Trajectory) -> None:
    velocity, _ = digits_teacher(3)
    end = euler_sample(velocity, digits_path.states[:1], 64, NoiseSchedule())
    torch.testing.assert_close(digits_path.states[-1:], end)
    for n, (x, x_next) in enumerate(pairwise(digits_path.states)):
        step = digits_path.sigmas[n + 1] - digits_path.sigmas[n]
        torch.testing.assert_close(x_next, x + step * digits_path.velocities[n])


def test_thirty_two_components_follow_the_digits_teacher(digits_path: Trajectory) -> None:
    fits = compare(digits_path, (1, 32), (10,), iterations=150)
    assert fits["GM K=32"].velocity_error < 0.5 * fits["GM K=1"].velocity_error
    assert fits["GM K=32"].endpoint_mse < 1e-4
    assert fits["DX N=10"].endpoint_mse < 1e-2
    for result in fits.values():
        torch.testing.assert_close(result.states[0], digits_path.states[0])


def test_a_fit_repeats(digits_path: Trajectory) -> None:
    first, second = (
        fit(StaticGM(digits_path, 4, Generator().manual_seed(1)), digits_path, iterations=5, generator=g)
        for g in (Generator().manual_seed(2), Generator().manual_seed(2))
    )
    assert torch.equal(first.states, second.states)


def test_an_imagenet_teacher_at_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, from a folder with random weights."""
    torch.manual_seed(0)
    DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=4, num_embeds_ada_norm=10
    ).save_pretrained(tmp_path)
    out = ["--json", str(tmp_path / "toy.json")]
    words = ["--teacher", "dit", "--path", str(tmp_path), "--label", "7", "--guidance", "3.2", "--steps", "8"]
    assert main([*words, "--components", "1", "4", "--grids", "5", "--iterations", "20", *out]) == 0
    rows = json.loads((tmp_path / "toy.json").read_text())
    assert [row["policy"] for row in rows] == ["GM K=1", "GM K=4", "DX N=5"]
    assert all(row["endpoint_mse"] < 1 for row in rows)
    assert "GM K=4    velocity error" in capsys.readouterr().out
    assert main(["--teacher", "dit"]) == 1
    assert "needs --path" in capsys.readouterr().err


def test_imagenet_guidance_acts_within_its_interval() -> None:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=4, num_embeds_ada_norm=10
    ).eval()
    guided, shape = dit_teacher(network, 7, 3.2)
    plain, _ = dit_teacher(network, 7, 1.0)
    x = torch.randn(1, *shape, generator=Generator().manual_seed(0))
    for sigma, same in ((0.9, True), (0.5, False)):
        level = torch.full((1,), sigma)
        assert torch.allclose(guided(x, level), plain(x, level), atol=1e-6) is same


def test_a_qwen_image_teacher_at_tiny_size() -> None:
    torch.manual_seed(0)
    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    prompt, negative = torch.randn(5, 12), torch.randn(2, 12)
    velocity, shape = qwen_image_teacher(network, prompt, negative, 4.0, (4, 6))
    assert shape == (4, 4, 6)
    path = follow(velocity, torch.randn(shape, generator=Generator().manual_seed(0)), 8, NoiseSchedule(shift=3.2))
    fits = compare(path, (4,), (5,), shift=3.2, iterations=20)
    assert all(result.endpoint_mse < 0.1 for result in fits.values())

    alone, _ = qwen_image_teacher(network, prompt, prompt, 1.0, (4, 6))
    padded, _ = qwen_image_teacher(network, prompt, torch.randn(9, 12), 1.0, (4, 6))
    x, sigma = path.states[:1], torch.ones(1)
    torch.testing.assert_close(padded(x, sigma), alone(x, sigma), atol=1e-5, rtol=1e-4)


def test_a_qwen_image_teacher_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole tiny pipeline on disk, prompts cached by `piflow cache-prompts`, and the toy's command line."""
    base = save_qwen_image(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = ["cache-prompts", str(tmp_path / "prompts.txt"), "--model", str(base), "--out", str(tmp_path / "cache")]
    assert CliRunner().invoke(app, [*words, "--device", "cpu"]).exit_code == 0
    words = ["--teacher", "qwen_image", "--path", str(base / "transformer")]
    small = ["--size", "32", "--steps", "4", "--components", "2", "--grids", "3", "--iterations", "3"]
    out = ["--json", str(tmp_path / "toy.json")]
    assert main([*words, *small, *out, "--prompts", str(tmp_path / "cache")]) == 0
    rows = json.loads((tmp_path / "toy.json").read_text())
    assert [row["policy"] for row in rows] == ["GM K=2", "DX N=3"]
    assert all(row["endpoint_mse"] < 1 for row in rows)
    assert main([*words, *small]) == 1
    assert "needs --prompts" in capsys.readouterr().err


def test_the_checkerboards_velocity_is_a_posterior_mean() -> None:
    """Against a sum over a fine grid of points, at noise levels where the grid is fine enough."""
    centres = (torch.arange(400, dtype=torch.float64) + 0.5) / 100 - 2
    points = torch.cartesian_prod(centres, centres)
    points = points[(points + 2).floor().sum(1) % 2 == 0]
    x_t = 1.5 * torch.randn(8, 2, 1, dtype=torch.float64, generator=Generator().manual_seed(0))
    for sigma in (0.2, 0.5, 0.9, 1.0):
        squares = (x_t[:, None, :, 0] - (1 - sigma) * points).square().sum(-1)
        x_0 = ((-squares / (2 * sigma**2)).softmax(1)[..., None] * points).sum(1)
        velocity = checkerboard_velocity(x_t, torch.full((8,), sigma, dtype=torch.float64))[..., 0]
        torch.testing.assert_close(velocity, (x_t[..., 0] - x_0) / sigma, atol=2e-3, rtol=0)


def test_the_checkerboards_velocity_is_finite_far_away_and_at_the_end() -> None:
    x_t = torch.tensor([[40.0, -40.0], [0.0, 0.0], [3.0, 1.999]])[..., None]
    for sigma in (1e-4, 0.01, 0.5, 1.0):
        velocity = checkerboard_velocity(x_t, torch.full((3,), sigma))
        assert velocity.isfinite().all()
        x_0 = x_t - sigma * velocity
        assert (x_0.abs() <= 2 + 1e-3).all()


def test_teacher_and_data_fill_the_squares() -> None:
    generator = Generator().manual_seed(0)
    assert share_inside(draw_data(2000, generator)) == 1
    noise = torch.randn(500, 2, 1, generator=generator)
    assert 0.3 < share_inside(noise) < 0.6
    assert share_inside(euler(noise, 64)) > 0.95


def test_a_student_on_the_plane_learns() -> None:
    result = run(num_points=500, shown=10, num_gaussians=16, iterations=60, batch_size=128)
    rows = result["rows"]
    student, teacher = rows["GM student, 1 NFE"], rows["teacher, 2 steps"]
    assert student["endpoint_mse"] < teacher["endpoint_mse"]
    assert rows["teacher, 64 steps"]["endpoint_mse"] == 0
    assert all(len(points) == 10 for points in result["points"].values())
