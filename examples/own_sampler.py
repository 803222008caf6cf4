"""Replace the substep loop of a sampler that is not ours.

    python examples/own_sampler.py

`EagerSampler` stands for what samplers and servers do today: in each of the student's steps, a loop over substeps that
computes the policy's velocity with a dozen tensor operations. `FusedSampler` overrides that method and gives the same
images.
"""

import time
from itertools import pairwise

import torch
from torch import Tensor, nn

from piflow_kernels import gm_rollout

Mixture = tuple[Tensor, Tensor, Tensor]


class EagerSampler:
    """Few-step sampling with a network (x_src, sigma_src) -> means, logstds, logweights.

    Shapes: (B, K, C, H, W), (B,) and (B, K, 1, H, W).
    """

    def __init__(self, network: nn.Module, nfe: int = 4, substeps: int = 32, shift: float = 3.2) -> None:
        self.network, self.substeps = network, substeps
        raw_t = torch.linspace(1, 0, nfe * substeps + 1)
        self.sigmas = shift * raw_t / (1 + (shift - 1) * raw_t)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) from noise of that shape."""
        for start in range(0, len(self.sigmas) - 1, self.substeps):
            sigmas = self.sigmas[start : start + self.substeps + 1]
            x = self.substep_loop(x, sigmas, self.network(x, sigmas[0]))
        return x

    def substep_loop(self, x_src: Tensor, sigmas: Tensor, mixture: Mixture) -> Tensor:
        """Euler steps along the posterior mean velocity of the mixture."""
        means, logstds, logweights = mixture
        sigma_src = sigmas[0]
        mu = x_src[:, None] - sigma_src * means
        variance = (2 * logstds).exp().reshape(-1, 1, 1, 1) * sigma_src**2
        a_src = (1 - sigma_src) / sigma_src
        x = x_src
        for sigma, sigma_next in pairwise(sigmas):
            a = (1 - sigma) / sigma
            zeta, nu = a**2 - a_src**2, a * x / sigma - a_src * x_src / sigma_src
            precision = 1 + variance * zeta
            match = (mu * nu[:, None]).sum(2, keepdim=True) - zeta * mu.square().sum(2, keepdim=True) / 2
            weights = torch.softmax(logweights + match / precision[:, None], dim=1)
            x_0 = (variance * nu + (weights * mu).sum(1)) / precision
            x = x + (sigma_next - sigma) * (x - x_0) / sigma
        return x


class FusedSampler(EagerSampler):
    """The same with the loop as one operator."""

    def substep_loop(self, x_src: Tensor, sigmas: Tensor, mixture: Mixture) -> Tensor:
        """One call: the loop collapses to K coefficients for each pixel."""
        return gm_rollout(x_src, sigmas, x_src, sigmas[0], *mixture)


class RandomStudent(nn.Module):
    """Stands for a student: a convolution whose output is split into the parameters of the mixture."""

    def __init__(self, components: int = 8, channels: int = 16) -> None:
        super().__init__()
        self.components = components
        self.layer = nn.Conv2d(channels, components * (channels + 1), 3, padding=1)

    def forward(self, x_src: Tensor, sigma_src: Tensor) -> Mixture:
        """The mixture at `x_src`; a real network also looks at `sigma_src`."""
        output = self.layer(x_src).unflatten(1, (self.components, -1))
        return output[:, :, :-1], torch.full((len(x_src),), -1.5), output[:, :, -1:]


def main() -> None:
    torch.manual_seed(0)
    student, noise = RandomStudent(), torch.randn(1, 16, 64, 64)
    images, seconds = [], []
    for kind in (EagerSampler, FusedSampler):
        sampler = kind(student)
        sampler(noise)  # warm
        start = time.perf_counter()
        images.append(sampler(noise))
        seconds.append(time.perf_counter() - start)
    error = (images[0] - images[1]).abs().max() / images[0].abs().max()
    print(f"largest difference {error:.1e} of the largest value: float32 rounding near noise level 0")
    print(f"eager {1000 * seconds[0]:.0f} ms, fused {1000 * seconds[1]:.0f} ms, the network's share included")


if __name__ == "__main__":
    main()
