"""The pictures of docs/how_it_works.md, made by the library itself: `python docs/pictures.py [--out docs/images]`."""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule, segments
from piflow_kernels import gm_rollout, gm_velocity

MODES, STD, WEIGHTS = torch.tensor([-1.4, 0.1, 1.5]), 0.12, torch.tensor([0.3, 0.3, 0.4])
TEACHER, STUDENT, EVALUATION = "#9aa5b1", "#3949ab", "#d81b60"


def exact_policy(x_src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a perfect student answers at noise level 1, where nothing is known of x_0 yet: the data's own mixture.

    x_src (B, 1, 1) -> means (B, K, 1, 1) in velocity space (u = x_src - x_0), logstds (B,), logweights (B, K, 1, 1).
    """
    means = x_src[:, None] - MODES.reshape(1, -1, 1, 1)
    logweights = WEIGHTS.log().reshape(1, -1, 1, 1).expand(len(x_src), -1, 1, 1)
    return means, torch.full((len(x_src),), STD).log(), logweights


def path(x_src: Tensor, levels: Tensor) -> Tensor:
    """States (N + 1, B) that the policy visits at the noise levels (N + 1,)."""
    mixture = exact_policy(x_src)
    states = [gm_rollout(x_src, levels[: n + 1], x_src, 1.0, *mixture) for n in range(1, len(levels))]
    return torch.stack([x_src, *states]).flatten(1)


def euler(x_src: Tensor, levels: Tensor) -> Tensor:
    """The same with Euler steps along the exact velocity: a network evaluation at each."""
    mixture = exact_policy(x_src)
    states = [x_src]
    for sigma, sigma_next in pairwise(levels):
        velocity = gm_velocity(states[-1], sigma, x_src, 1.0, *mixture)
        states.append(states[-1] + (sigma_next - sigma) * velocity)
    return torch.stack(states).flatten(1)


def draw_policy(file: Path) -> None:
    """Three ways from noise to data in one dimension: many steps, two steps, one policy."""
    x_src = torch.linspace(-2, 2, 9)[:, None, None]
    fine, coarse = torch.linspace(1, 0, 129), torch.linspace(1, 0, 3)
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axes, title, levels, states, dots in (
        (panels[0], "teacher, 128 Euler steps:\n128 network evaluations", fine, euler(x_src, fine), None),
        (panels[1], "teacher, 2 Euler steps:\n2 network evaluations", coarse, euler(x_src, coarse), coarse[:-1]),
        (panels[2], "pi-Flow, 1 evaluation and\n128 policy substeps", fine, path(x_src, fine), fine[:1]),
    ):
        axes.plot(1 - levels, states, color=STUDENT if dots is not None else TEACHER, linewidth=1.2)
        if dots is not None:
            at = [int((levels - level).abs().argmin()) for level in dots]
            times = (1 - dots)[:, None].expand(-1, len(x_src))
            axes.scatter(times, states[at], color=EVALUATION, s=14, zorder=3, label="network evaluated")
            axes.legend(loc="upper center", frameon=False, fontsize=8)
        _data(axes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("1 - noise level")
    panels[0].set_ylabel("x")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_segments(file: Path, nfe: int = 4, final: float = 0.5, total_substeps: int = 128, shift: float = 3.2) -> None:
    """Raw time and noise level of the text-to-image recipes: where the network is evaluated, where the substeps are."""
    schedule = NoiseSchedule(shift=shift)
    raw_t = torch.linspace(1, 0, 400)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(1 - raw_t, schedule.sigma(raw_t), color=TEACHER, zorder=1)
    for number, (start, size) in enumerate(segments(nfe, final)):
        levels = schedule.substep_sigmas(torch.tensor([start]), torch.tensor([start - size]), total_substeps)[0]
        times = 1 - schedule.raw_t(levels)
        axes.scatter(times, levels, s=7, color=STUDENT, zorder=2, label="policy substeps" if number == 0 else None)
        label = "network evaluations" if number == 0 else None
        axes.scatter(times[:1], levels[:1], s=42, color=EVALUATION, zorder=3, label=label)
        axes.annotate(
            f"{len(levels) - 1} substeps", (1 - start + size / 2, 1.07), ha="center", fontsize=9, color=STUDENT
        )
        axes.axvline(1 - start, color="#dde3ea", zorder=0)
    axes.set(xlabel="1 - raw time", ylabel="noise level", xlim=(-0.02, 1.02), ylim=(-0.02, 1.14))
    axes.set_title(f"{nfe} NFE, last segment half as long, shift {shift}", fontsize=10)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _data(axes: Axes) -> None:
    for mode, weight in zip(MODES.tolist(), WEIGHTS.tolist()):
        axes.plot([1.02, 1.02], [mode - 2 * STD, mode + 2 * STD], color="black", linewidth=10 * weight, clip_on=False)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.5, 1], ["noise", "0.5", "data"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/how_it_works.md.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw_policy(out / "policy.png")
    draw_segments(out / "segments.png")


if __name__ == "__main__":
    main()
