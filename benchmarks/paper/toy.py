"""The paper's toy: one static policy fitted to one trajectory of a teacher, without a student network.

    python -m benchmarks.paper.toy --teacher digits
    python -m benchmarks.paper.toy --teacher dit --path models/dit-xl-imagenet256-repa --label 207 --device cuda
    python -m benchmarks.paper.toy --teacher qwen_image --path models/Qwen-Image/transformer \\
        --prompts data/Qwen-Image-prompts --device cuda --dtype bfloat16

Guidance scale and shift are those of the teacher's published recipe unless they are given.

The free parameters are what a network would predict at the noise: means, logstd and logweights of a GM policy, or the
grid of a DX policy. They are fitted to the teacher's velocities at the states of its own trajectory; then the policy is
rolled out from the noise alone. How far it ends from the teacher says how much a policy can express.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from piflow.distillation import VelocityFn, guided_teacher
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import DXPolicy, GMFlowPolicy, Policy
from piflow_kernels import dx_velocity, gm_velocity

TEACHERS = {"digits": (2.0, 1.0), "dit": (3.2, 1.0), "qwen_image": (4.0, 3.2)}
"""Guidance scale and shift of the noise schedule."""


class Trajectory(NamedTuple):
    """N Euler steps of a teacher: states (N + 1, C, *S), noise levels (N + 1,), velocities (N, C, *S)."""

    states: Tensor
    sigmas: Tensor
    velocities: Tensor


@torch.no_grad()
def follow(velocity: VelocityFn, noise: Tensor, num_steps: int, schedule: NoiseSchedule) -> Trajectory:
    """The teacher's path from one noise (C, *S), uniform in raw time."""
    sigmas = schedule.sigma(torch.linspace(1, 0, num_steps + 1)).to(noise.device)
    states, velocities = [noise], []
    for sigma, sigma_next in pairwise(sigmas):
        velocities.append(velocity(states[-1][None], sigma[None])[0].to(noise.dtype))
        states.append(states[-1] + (sigma_next - sigma) * velocities[-1])
    return Trajectory(torch.stack(states), sigmas, torch.stack(velocities))


def seen_from_source(path: Trajectory) -> Tensor:
    """The teacher's estimates of x_0 along its path as policies hold them, noise - x_0: (N, C, *S)."""
    sigmas = path.sigmas[:-1].reshape(-1, *[1] * (path.states.dim() - 1))
    return path.states[0] - (path.states[:-1] - sigmas * path.velocities)


class StaticGM(nn.Module):
    """A GM policy of K components (means (K, C, *S), one logstd, logweights (K, 1, *S)) at the trajectory's noise."""

    def __init__(self, path: Trajectory, size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        c, *space = path.states.shape[1:]
        picked = seen_from_source(path)[torch.linspace(0, len(path.velocities) - 1, size).round().long()]
        spread = 0.01 * torch.randn(size, c, *space, generator=generator).to(picked)
        self.means = nn.Parameter(picked + spread)
        self.logweights = nn.Parameter(picked.new_zeros(size, 1, *space))
        self.logstd = nn.Parameter(picked.new_full((1,), -2.0))
        self.x_src = path.states[:1]

    def velocity(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """At n states (n, C, *S) of levels (n,): one mixture, asked n times."""
        n = len(x_t)
        means, logweights = (p.expand(n, *p.shape) for p in (self.means, self.logweights))
        x_src = self.x_src.expand_as(x_t)
        return gm_velocity(x_t, sigma, x_src, torch.ones_like(sigma), means, self.logstd.expand(n), logweights)

    def policy(self) -> Policy:
        """Without gradient."""
        sigma = torch.ones(1, device=self.means.device)
        means, logweights = self.means.detach()[None], self.logweights.detach()[None]
        return GMFlowPolicy(means, self.logstd.detach(), logweights, self.x_src, sigma)


class StaticDX(nn.Module):
    """A DX policy with a grid (N, C, *S) at the trajectory's noise, uniform in raw time."""

    def __init__(self, path: Trajectory, size: int, shift: float) -> None:
        super().__init__()
        picked = torch.linspace(len(path.velocities) - 1, 0, size).round().long()  # index 0 is the segment's end
        self.grid = nn.Parameter(seen_from_source(path)[picked])
        self.x_src, self.shift = path.states[:1], shift

    def velocity(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """At n states (n, C, *S) of levels (n,)."""
        grid = self.grid.expand(len(x_t), *self.grid.shape)
        return dx_velocity(x_t, sigma, self.x_src.expand_as(x_t), torch.ones_like(sigma), grid, 1.0, self.shift)

    def policy(self) -> Policy:
        """Without gradient."""
        sigma = torch.ones(1, device=self.grid.device)
        return DXPolicy(self.grid.detach()[None], self.x_src, sigma, 1.0, self.shift)


@dataclass(frozen=True)
class Fit:
    """velocity_error: mean square over the trajectory, relative to the variance of the teacher's velocities around
    their mean over time (a straight line has 1). endpoint_mse: of the policy's own rollout. states: that rollout.
    """

    velocity_error: float
    endpoint_mse: float
    states: Tensor


def fit(
    static: StaticGM | StaticDX,
    path: Trajectory,
    *,
    iterations: int = 1000,
    states_per_iteration: int = 32,
    learning_rate: float = 0.03,
    generator: torch.Generator | None = None,
) -> Fit:
    """Regress the policy's velocity on the teacher's at random states of the path; Adam, rate falling to zero."""
    optimizer = torch.optim.Adam(static.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    count = len(path.velocities)
    for _ in range(iterations):
        index = torch.randperm(count, generator=generator)[:states_per_iteration].to(path.states.device)
        error = static.velocity(path.states[index], path.sigmas[index]) - path.velocities[index]
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        errors = [
            (static.velocity(x[None], sigma[None])[0] - u).square().mean()
            for x, sigma, u in zip(path.states, path.sigmas, path.velocities)
        ]
    variance = path.velocities.sub(path.velocities.mean(dim=0)).square().mean()
    policy, levels = static.policy(), path.sigmas[None]
    states = torch.cat([path.states[:1], *(policy.rollout(path.states[:1], levels[:, : n + 2]) for n in range(count))])
    endpoint = (states[-1] - path.states[-1]).square().mean()
    return Fit((torch.stack(errors).mean() / variance).item(), endpoint.item(), states)


def compare(
    path: Trajectory,
    components: tuple[int, ...] = (1, 4, 8, 32),
    grids: tuple[int, ...] = (5, 10, 20),
    *,
    shift: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> dict[str, Fit]:
    """Fits of GM policies with K components and DX policies with N grid points."""
    found = {}
    for kind, sizes in (("GM K", components), ("DX N", grids)):
        for size in sizes:
            draw = torch.Generator().manual_seed(seed)
            static = StaticGM(path, size, draw) if kind == "GM K" else StaticDX(path, size, shift)
            found[f"{kind}={size}"] = fit(static, path, generator=draw, **options)
    return found


def digits_teacher(label: int = 3, guidance_scale: float = 2.0) -> tuple[VelocityFn, tuple[int, ...]]:
    """The shipped digits teacher and the shape of its states."""
    from piflow.digits.data import IMAGE_SHAPE
    from piflow.digits.teacher import load_teacher, teacher_velocity

    return teacher_velocity(load_teacher(), torch.tensor([label]), guidance_scale), IMAGE_SHAPE


def dit_teacher(
    network: Any, label: int, guidance_scale: float, interval: tuple[float, float] | None = (0.0, 0.7)
) -> tuple[VelocityFn, tuple[int, ...]]:
    """A class-conditional DiT of ImageNet latents, such as the one trained with REPA, in diffusers' form."""
    config, device = network.config, network.device
    labels = torch.tensor([label], device=device)

    @torch.no_grad()
    def velocity(x_t: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        return network(x_t.to(network.dtype), timestep=1000 * sigma, class_labels=cond).sample.float()

    null = torch.full_like(labels, config.num_embeds_ada_norm)
    teacher = guided_teacher(velocity, labels, null, guidance_scale, interval=interval)
    return teacher, (config.in_channels, config.sample_size, config.sample_size)


def qwen_image_teacher(
    network: Any, prompt: Tensor, negative: Tensor, guidance_scale: float, size: tuple[int, int]
) -> tuple[VelocityFn, tuple[int, ...]]:
    """Qwen-Image's transformer on spatial latents (C, H, W); prompt (L, D) and negative (M, D) embeddings."""
    from piflow.training.networks import TextCalls

    calls = TextCalls("qwen_image", network.config.in_channels)
    network.eval()
    h, w = size
    channels = network.config.in_channels // 4
    embeds = nn.utils.rnn.pad_sequence([prompt, negative], batch_first=True).to(network.device)
    mask = torch.arange(embeds.shape[1], device=network.device) < torch.tensor(
        [[len(prompt)], [len(negative)]], device=network.device
    )

    @torch.no_grad()
    def velocity(x_t: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        condition = {"prompt_embeds": embeds[cond], "prompt_mask": mask[cond]}
        tokens = calls.state(x_t).to(network.dtype)
        out = network(**calls.inputs(tokens, sigma, condition, size), return_dict=False)[0].float()
        pixels = out.reshape(len(x_t), h // 2, w // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(x_t.shape)

    index = torch.zeros(1, dtype=torch.long, device=network.device)
    return guided_teacher(velocity, index, index + 1, guidance_scale), (channels, h, w)


def run_digits(label: int = 3, num_steps: int = 128, seed: int = 0, **options: Any) -> dict[str, Any]:
    """The toy on the digits teacher, as it is stored: one trajectory, all policies."""
    velocity, shape = digits_teacher(label)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    path = follow(velocity, noise, num_steps, NoiseSchedule())
    fits = compare(path, **options)
    return {
        "label": label,
        "num_steps": num_steps,
        "teacher": _picture(path.states[-1]),
        "fits": {
            name: {"velocity_error": f.velocity_error, "endpoint_mse": f.endpoint_mse, "x_0": _picture(f.states[-1])}
            for name, f in fits.items()
        },
        "pixel": {"teacher": _pixel(path.states, path), **{n: _pixel(f.states, path) for n, f in fits.items()}},
    }


def _picture(x_0: Tensor) -> list[list[float]]:
    return [[round(v, 3) for v in row] for row in x_0[0].tolist()]


def _pixel(states: Tensor, path: Trajectory) -> list[float]:
    """The path of the pixel whose teacher's velocity varies most."""
    pixel = path.velocities.flatten(1).var(dim=0).argmax()
    return [round(v, 4) for v in states.flatten(1)[::4, pixel].tolist()]


def _teacher(arguments: argparse.Namespace) -> tuple[VelocityFn, tuple[int, ...]]:
    if arguments.teacher == "digits":
        return digits_teacher(arguments.label, arguments.guidance)
    if arguments.path is None:
        raise ValueError(f"--teacher {arguments.teacher} needs --path, the folder with config.json and the weights")
    dtype = getattr(torch, arguments.dtype)
    if arguments.teacher == "dit":
        from piflow.models.dit import load_dit_teacher

        network: Any = load_dit_teacher(arguments.path).to(arguments.device, dtype)
        return dit_teacher(network, arguments.label, arguments.guidance)
    from diffusers import QwenImageTransformer2DModel

    from piflow.data import ShardedDataset
    from piflow.data.prompts import read_negative

    if arguments.prompts is None:
        raise ValueError("--teacher qwen_image needs --prompts, a folder that `piflow cache-prompts` wrote")
    network = QwenImageTransformer2DModel.from_pretrained(arguments.path, torch_dtype=dtype).to(arguments.device)
    prompt = ShardedDataset(arguments.prompts, "prompts")[0]["prompt_embeds"]
    negative = read_negative(arguments.prompts)["prompt_embeds"]
    side = arguments.size // 8
    return qwen_image_teacher(network, prompt, negative, arguments.guidance, (side, side))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.toy", description="Fit one trajectory.")
    parser.add_argument("--teacher", choices=TEACHERS, default="digits")
    parser.add_argument("--path", type=Path, help="folder of the teacher's network")
    parser.add_argument("--prompts", type=Path, help="cached prompts; the first one is taken")
    parser.add_argument("--label", type=int, default=3, help="class of a class-conditional teacher")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the teacher's)")
    parser.add_argument("--size", type=int, default=1024, help="pixels, of a text-to-image teacher")
    parser.add_argument("--shift", type=float, help="of the noise schedule (default: the teacher's)")
    parser.add_argument("--steps", type=int, default=128, help="of the teacher (default: %(default)s)")
    parser.add_argument("--components", type=int, nargs="*", default=(1, 4, 8, 32))
    parser.add_argument("--grids", type=int, nargs="*", default=(5, 10, 20))
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the errors to this file")
    arguments = parser.parse_args(argv)
    guidance, shift = TEACHERS[arguments.teacher]
    arguments.guidance = guidance if arguments.guidance is None else arguments.guidance
    arguments.shift = shift if arguments.shift is None else arguments.shift
    try:
        velocity, shape = _teacher(arguments)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(arguments.seed)).to(arguments.device)
    path = follow(velocity, noise, arguments.steps, NoiseSchedule(shift=arguments.shift))
    sizes = tuple(arguments.components), tuple(arguments.grids)
    fits = compare(path, *sizes, shift=arguments.shift, seed=arguments.seed, iterations=arguments.iterations)
    rows = [{"policy": n, "velocity_error": f.velocity_error, "endpoint_mse": f.endpoint_mse} for n, f in fits.items()]
    for name, result in fits.items():
        print(f"{name:8}  velocity error {result.velocity_error:.3g}, endpoint MSE {result.endpoint_mse:.3g}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
