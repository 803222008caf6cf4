"""pi-ID in two dimensions, where one can see it: a student of one network evaluation on a checkerboard.

    python examples/checkerboard.py [--iterations 2000] [--out checkerboard.png]

The teacher is exact: for data that are a dense set of points, the posterior mean of x_0 is a softmax over them. The
student is a small MLP that returns a mixture of 32 Gaussians, a "pixel" of two channels.
"""

import argparse
from itertools import pairwise

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from piflow.distillation import ImitationConfig, imitation_segment, sample_source_times
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import GMFlowPolicy
from piflow.sampler import gm_policy_fn, sample
from piflow.training.ema import karras_momentum, update_average

SCHEDULE, SUBSTEPS, K = NoiseSchedule(), 64, 32


def board(side: int = 64) -> Tensor:
    """Points (N, 2) that fill the eight dark squares of a 4 x 4 board on [-2, 2]."""
    axis = (torch.arange(side) + 0.5) / side * 4 - 2
    points = torch.cartesian_prod(axis, axis)
    squares = ((points + 2) // 1).sum(1) % 2 == 0
    return points[squares]


def teacher_velocity(x_t: Tensor, sigma: Tensor, points: Tensor) -> Tensor:
    """u = (x_t - E[x_0 | x_t]) / sigma for x_t (B, 2, 1), sigma (B,)."""
    level = sigma.clamp(min=1e-3)[:, None]
    distance = (x_t[:, None, :, 0] - (1 - level[..., None]) * points).square().sum(-1)
    x_0 = torch.softmax(-distance / (2 * level**2), dim=1) @ points
    return (x_t[:, :, 0] - x_0)[..., None] / level[..., None]


def euler(x: Tensor, points: Tensor, steps: int) -> Tensor:
    """The teacher's samples from noise (B, 2, 1)."""
    for sigma, sigma_next in pairwise(torch.linspace(1, 0, steps + 1)):
        x = x + (sigma_next - sigma) * teacher_velocity(x, sigma.expand(len(x)), points)
    return x


class Student(nn.Module):
    """(x_src (B, 2, 1), sigma_src (B,)) -> means (B, K, 2, 1), logstds (B,), logweights (B, K, 1, 1)."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.means, self.logweights = nn.Linear(width, 2 * K), nn.Linear(width, K)
        self.logstd = nn.Linear(width, 1)

    def forward(self, x_src: Tensor, sigma_src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's parameters."""
        hidden = self.trunk(torch.cat([x_src[:, :, 0], sigma_src[:, None]], dim=1))
        means = self.means(hidden).unflatten(1, (K, 2, 1))
        return means, self.logstd(hidden)[:, 0] - 1, self.logweights(hidden).unflatten(1, (K, 1, 1))


def distil(points: Tensor, iterations: int, batch_size: int = 256) -> Student:
    """The averaged student."""
    student = Student()
    average = AveragedModel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    imitation = ImitationConfig(nfe=1, total_substeps=SUBSTEPS, num_intermediate_states=2, policy_dropout=0.05)
    for iteration in range(iterations):
        source = sample_source_times(batch_size, imitation, SCHEDULE)
        x_src = torch.randn(batch_size, 2, 1)  # one segment: it starts at pure noise
        policy = GMFlowPolicy(*student(x_src, source.sigma), x_src, source.sigma)
        result = imitation_segment(policy, lambda x, s: teacher_velocity(x, s, points), source, SCHEDULE, imitation)
        optimizer.zero_grad()
        result.loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        update_average(average.module.parameters(), student.parameters(), karras_momentum(iteration, gamma=7.0))
    return average.module


def on_the_board(x: Tensor) -> float:
    """Share of the samples (B, 2, 1) that lie on dark squares."""
    inside = (x.abs() < 2).all(1)[:, 0]
    dark = ((x[:, :, 0] + 2) // 1).sum(1) % 2 == 0
    return (inside & dark).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a checkerboard; see the file.")
    parser.add_argument("--iterations", type=int, default=2000, help="default: %(default)s, a minute or two on a CPU")
    parser.add_argument("--out", default="checkerboard.png", help="default: %(default)s")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    points = board()
    student = distil(points, arguments.iterations)
    noise = torch.randn(4000, 2, 1)
    with torch.no_grad():
        few = sample(gm_policy_fn(student), noise, 1, schedule=SCHEDULE, total_substeps=SUBSTEPS)
    coarse = euler(noise, points, steps=4)
    figure, panels = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharex=True, sharey=True)
    for axes, title, x in ((panels[0], "teacher, 4 Euler steps", coarse), (panels[1], "student, 1 NFE", few)):
        axes.scatter(*x[:, :, 0].T, s=2)
        axes.set(title=f"{title}: {on_the_board(x):.0%} on the board", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
        axes.set_aspect("equal")
        print(f"{title}: {on_the_board(x):.3f} on the board")
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()
