"""The operators by themselves: needs torch and `pip install .`, nothing else.

    python examples/operators.py

A Gaussian mixture for each latent pixel, as a student network predicts it, followed over 37 substeps; the gradient that
training takes; and a grid policy.
"""

import torch
from torch import Tensor

from piflow_kernels import dx_rollout, gm_mean_velocity_loss, gm_rollout


def mixture_rollout(batch: int = 1, components: int = 8, channels: int = 16, size: int = 32) -> tuple[Tensor, Tensor]:
    """The fused rollout and the textbook's, from noise level 1 down to that of the second of four segments."""
    x_src = torch.randn(batch, channels, size, size)
    means = torch.randn(batch, components, channels, size, size, dtype=torch.bfloat16)  # read in the dtype they come in
    logweights = torch.randn(batch, components, 1, size, size, dtype=torch.bfloat16)
    raw_t = torch.linspace(1.0, 1 - 1 / 3.5, 38)
    sigmas = 3.2 * raw_t / (1 + 2.2 * raw_t)  # shift 3.2
    network_output = (means, -2.0, logweights)
    fused = gm_rollout(x_src, sigmas, x_src, 1.0, *network_output)
    textbook = gm_rollout(x_src, sigmas, x_src, 1.0, *network_output, backend="reference")
    return fused, textbook


def imitation_gradients(batch: int = 2) -> tuple[Tensor, Tensor]:
    """What training differentiates: the mean velocity of a short window against the teacher's. Loss (B,), gradient."""
    means = torch.randn(batch, 8, 16, 16, 16, requires_grad=True)
    logweights = torch.randn(batch, 8, 1, 16, 16)
    x_src, x_a, teacher_velocity = torch.randn(3, batch, 16, 16, 16)
    window = torch.tensor([0.60, 0.58, 0.55]).expand(batch, 3)  # noise levels
    loss = gm_mean_velocity_loss(x_a, window, x_src, 0.75, means, -1.0, logweights, teacher_velocity)
    (gradient,) = torch.autograd.grad(loss.mean(), means)
    return loss.detach(), gradient


def grid_rollout(batch: int = 1, points: int = 10) -> tuple[Tensor, Tensor]:
    """A DX policy: velocities at `points` times of the segment. The whole rollout is one weighted sum of them."""
    x_src, grid = torch.randn(batch, 16, 32, 32), torch.randn(batch, points, 16, 32, 32)
    sigmas = torch.linspace(1.0, 0.75, 33)
    fused, textbook = (
        dx_rollout(x_src, sigmas, x_src, 1.0, grid, segment_size=0.25, shift=1.0, backend=backend)
        for backend in (None, "reference")
    )
    return fused, textbook


def main() -> None:
    torch.manual_seed(0)
    for name, (fused, textbook) in (("GM", mixture_rollout()), ("DX", grid_rollout())):
        print(f"{name} rollout {tuple(fused.shape)}: {(fused - textbook).abs().max():.1e} from the textbook's loop")
    loss, gradient = imitation_gradients()
    print(f"imitation loss {[round(value, 3) for value in loss.tolist()]}, gradient {tuple(gradient.shape)}")


if __name__ == "__main__":
    main()
