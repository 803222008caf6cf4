"""How much can one policy say? Fit a static Gaussian mixture to one trajectory of the teacher, without a network.

    python examples/static_gm_fit.py

The free parameters are what a student would predict at the noise. They are fitted to the teacher's velocities at the
states of its own trajectory; then the policy is followed from the noise alone, and where it ends is compared with the
teacher's image.
`python -m benchmarks.paper.toy` does the same for ImageNet DiT and Qwen-Image teachers, and for DX policies.
"""

from itertools import pairwise

import torch
from torch import Tensor

from piflow.digits.data import IMAGE_SHAPE
from piflow.digits.teacher import load_teacher, teacher_velocity
from piflow_kernels import gm_rollout, gm_velocity

LEVELS = torch.linspace(1, 0, 65)  # noise levels: 64 Euler steps


def teacher_trajectory(noise: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """States (65, 1, 8, 8) and velocities (64, 1, 8, 8) from one noise (1, 1, 8, 8)."""
    velocity = teacher_velocity(load_teacher(), torch.tensor([label]), guidance_scale=2.0)
    states, velocities = [noise], []
    for sigma, sigma_next in pairwise(LEVELS):
        velocities.append(velocity(states[-1], sigma[None]))
        states.append(states[-1] + (sigma_next - sigma) * velocities[-1])
    return torch.cat(states), torch.cat(velocities)


def fit(states: Tensor, velocities: Tensor, components: int, steps: int) -> Tensor:
    """The end of the fitted policy's rollout from the noise, (1, 1, 8, 8)."""
    torch.manual_seed(0)
    noise = states[:1]
    # The components start at estimates of x_0 along the trajectory, as velocities seen from the noise.
    estimates = noise - (states[:-1] - LEVELS[:-1].reshape(-1, 1, 1, 1) * velocities)
    means = estimates[torch.linspace(0, 63, components).round().long()][None].clone().requires_grad_()
    logweights = torch.zeros(1, components, 1, 8, 8, requires_grad=True)
    logstds = torch.full((1,), -2.0, requires_grad=True)
    optimizer = torch.optim.Adam([means, logweights, logstds], lr=0.03)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        mixture = (part.expand(64, *part.shape[1:]) for part in (means, logstds, logweights))
        predicted = gm_velocity(states[:-1], LEVELS[:-1], noise.expand(64, -1, -1, -1), 1.0, *mixture)
        loss = (predicted - velocities).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return gm_rollout(noise, LEVELS, noise, 1.0, means, logstds, logweights)


def main(steps: int = 1000) -> None:
    noise = torch.randn(1, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))
    states, velocities = teacher_trajectory(noise, label=3)
    for components in (1, 4, 8, 32):
        end = fit(states, velocities, components, steps)
        error = (end - states[-1:]).square().mean().sqrt()
        print(f"K = {components:2d}: ends {error:.5f} from the teacher's image (root mean square)")


if __name__ == "__main__":
    main()
