"""A GM policy in one evaluation against its teacher on the 2D checkerboard, whose velocity field is known exactly."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from piflow.distillation import ImitationConfig, imitation_segment, sample_source_times
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import GMFlowPolicy
from piflow.training.ema import karras_momentum, update_average

EDGES = torch.linspace(-2, 2, 5, dtype=torch.float64)
"""Of the four intervals along each axis; interval i times interval j is filled where i + j is even."""


def truncated_normal(mean: Tensor, std: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(log mass, mean) of a normal restricted to [low, high]; float64, all shapes broadcast.

    Mirrored into the lower tail, where log Phi keeps its precision, whatever the side the interval lies on.
    """
    a, b = (low - mean) / std, (high - mean) / std
    mirrored = a + b > 0
    a, b = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
    log_low, log_high = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    log_mass = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-300)))

    def log_density(x: Tensor) -> Tensor:
        return -0.5 * x * x - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=x.dtype))

    shift = (log_density(a) - log_mass).exp() - (log_density(b) - log_mass).exp()
    inside = mean + torch.where(mirrored, -shift, shift) * std
    return log_mass, inside.clamp(min=low, max=high)  # far away the shift loses digits, never the interval


def checkerboard_velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
    """Exact u = (x_t - E[x_0 | x_t]) / sigma of the uniform density on the eight squares: x_t (B, 2, 1), sigma (B,).

    Given x_t, x_0 is a normal of mean x_t / (1 - sigma) and deviation sigma / (1 - sigma), cut to the squares.
    """
    x, level = x_t.double()[..., None], sigma.double().reshape(-1, 1, 1, 1)  # (B, 2, 1, 1)
    scale = (1 - level).clamp(min=1e-6)
    log_mass, mean = truncated_normal(x / scale, (level / scale).clamp(min=1e-9), EDGES[:-1], EDGES[1:])  # (B, 2, 1, 4)
    filled = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    joint = log_mass[:, 0, 0, :, None] + log_mass[:, 1, 0, None, :]
    weight = joint.masked_fill(~filled, -torch.inf).flatten(1).softmax(1).reshape(-1, 4, 4)
    x_0 = torch.stack([(weight.sum(2) * mean[:, 0, 0]).sum(1), (weight.sum(1) * mean[:, 1, 0]).sum(1)], 1)
    u = (x_t.double()[..., 0] - x_0) / sigma.double().clamp(min=1e-6)[:, None]
    return u[..., None].to(x_t.dtype)


def draw_data(count: int, generator: Generator) -> Tensor:
    """Points (count, 2, 1) of the density."""
    square = torch.randint(8, (count,), generator=generator)
    i = square // 2
    corner = torch.stack([i, 2 * (square % 2) + i % 2], 1)
    return (EDGES[0] + corner + torch.rand(count, 2, generator=generator))[..., None].float()


def share_inside(x_0: Tensor) -> float:
    """The share of points (B, 2, 1) that lie in filled squares."""
    cell = (x_0[..., 0] - EDGES[0]).floor()
    within = ((cell >= 0) & (cell < 4)).all(1) & (cell.sum(1) % 2 == 0)
    return within.double().mean().item()


def euler(x_1: Tensor, num_steps: int) -> Tensor:
    """The teacher's endpoints."""
    x, levels = x_1, torch.linspace(1, 0, num_steps + 1)
    for sigma, sigma_next in pairwise(levels):
        x = x + (sigma_next - sigma) * checkerboard_velocity(x, sigma.expand(len(x)))
    return x


class PlaneStudent(nn.Module):
    """A small network from the noise (B, 2, 1) to a mixture of K components."""

    def __init__(self, num_gaussians: int, width: int = 256) -> None:
        super().__init__()
        self.num_gaussians = num_gaussians
        self.body = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, 3 * num_gaussians + 1)

    def forward(self, x_src: Tensor) -> GMFlowPolicy:
        k = self.num_gaussians
        means, logweights, logstd = self.head(self.body(x_src[..., 0])).split([2 * k, k, 1], dim=1)
        x_0 = means.reshape(-1, k, 2, 1)
        sigma = x_src.new_ones(len(x_src))
        return GMFlowPolicy(
            x_src[:, None] - x_0, logstd[:, 0] - 1, logweights.reshape(-1, k, 1, 1).log_softmax(1), x_src, sigma
        )


def train(num_gaussians: int = 32, iterations: int = 1000, batch_size: int = 256, seed: int = 0) -> PlaneStudent:
    """pi-ID in one segment; the student that comes back holds the average of the weights."""
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    student, schedule = PlaneStudent(num_gaussians), NoiseSchedule()
    config = ImitationConfig(nfe=1, total_substeps=64, policy_dropout=0.05 if num_gaussians > 1 else 0.0)
    parameters: list[Tensor] = list(student.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    for iteration in range(iterations):
        x_src = torch.randn(batch_size, 2, 1, generator=generator)
        source = sample_source_times(batch_size, config, schedule, generator=generator)
        result = imitation_segment(student(x_src), checkerboard_velocity, source, schedule, config, generator=generator)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, parameters, karras_momentum(iteration, 7.0))
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return student


@torch.no_grad()
def run(num_points: int = 3000, shown: int = 800, **options: Any) -> dict[str, Any]:
    """The picture's points and the metrics: data, teacher, student in one evaluation."""
    start = time.perf_counter()
    with torch.enable_grad():
        student = train(**options)
    seconds = time.perf_counter() - start
    noise = torch.randn(num_points, 2, 1, generator=Generator().manual_seed(1))
    ones = torch.ones(num_points)
    reference = euler(noise, 64)
    points = {"data": draw_data(num_points, Generator().manual_seed(2)), "teacher, 64 steps": reference}
    points |= {f"teacher, {n} steps": euler(noise, n) for n in (2, 4, 8)}
    points["GM student, 1 NFE"] = student(noise).integrate(noise, ones, 0 * ones, NoiseSchedule(), 64)
    rows = {
        name: {"inside": share_inside(x), "endpoint_mse": None if name == "data" else _mse(x, reference)}
        for name, x in points.items()
    }
    kept = {name: [[round(v, 2) for v in p] for p in x[:shown, :, 0].tolist()] for name, x in points.items()}
    return {
        "rows": rows,
        "points": kept,
        "seconds": round(seconds, 1),
    }


def _mse(x: Tensor, reference: Tensor) -> float:
    return (x - reference).square().mean().item()
