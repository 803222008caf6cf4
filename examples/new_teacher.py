"""A student for a teacher that piflow has never heard of: any diffusers transformer that predicts a flow velocity.

    python examples/new_teacher.py

Here a tiny SD3 of random weights, so that it runs anywhere; `SD3Transformer2DModel.from_pretrained` loads a real one.
Initialise the student from the teacher, look at the difference that is printed, distil data-free, sample, save.
"""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from piflow.distillation import ImitationConfig, SourceTimes, imitation_trajectory
from piflow.models import GMSD3Transformer2DModel
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import GMFlowPolicy
from piflow.sampler import gm_policy_fn, sample

Prompt = dict[str, Tensor]
SCHEDULE = NoiseSchedule(shift=3.0)


def tiny_teacher() -> SD3Transformer2DModel:
    """Two narrow blocks of random weights."""
    return SD3Transformer2DModel(
        sample_size=8,
        pos_embed_max_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
    ).eval()


@torch.no_grad()
def difference(student: GMSD3Transformer2DModel, teacher: SD3Transformer2DModel, prompt: Prompt) -> float:
    """Between the velocities of both at the same states: rounding only, or the head does not fit the transformer."""
    x_src, sigma_src = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.6])
    mixture = student(x_src, timestep=1000 * sigma_src, **prompt)
    velocity = teacher(x_src, timestep=1000 * sigma_src, **prompt).sample
    return (GMFlowPolicy(*mixture, x_src, sigma_src).velocity(x_src, sigma_src) - velocity).abs().max().item()


def distil(student: GMSD3Transformer2DModel, teacher: SD3Transformer2DModel, prompt: Prompt, iterations: int) -> None:
    """Data-free pi-ID on one batch of prompts: each segment starts where the student's own rollout ended."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    config = ImitationConfig(nfe=4, total_substeps=32)

    def policy_at(x_src: Tensor, source: SourceTimes) -> GMFlowPolicy:
        return GMFlowPolicy(*student(x_src, timestep=1000 * source.sigma, **prompt), x_src, source.sigma)

    def teacher_velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        return teacher(x_t, timestep=1000 * sigma, **prompt).sample

    for iteration in range(iterations):
        optimizer.zero_grad()
        total = 0.0
        noise = torch.randn(2, 4, 8, 8)
        for weight, result in imitation_trajectory(policy_at, teacher_velocity, noise, SCHEDULE, config):
            (weight * result.loss).backward()
            total += weight * result.loss.item()
        optimizer.step()
        print(f"iteration {iteration}   loss {total:.5f}")


def draw(student: GMSD3Transformer2DModel, prompt: Prompt) -> Tensor:
    """Latents (2, 4, 8, 8) in four network evaluations."""

    def network(x_src: Tensor, sigma_src: Tensor) -> tuple[Tensor, ...]:
        return tuple(student(x_src, timestep=1000 * sigma_src, **prompt))

    return sample(gm_policy_fn(network), torch.randn(2, 4, 8, 8), nfe=4, schedule=SCHEDULE, temperature="auto")


def main(out: Path = Path("sd3_student"), iterations: int = 3) -> None:
    torch.manual_seed(0)
    teacher = tiny_teacher()
    prompt = {"encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.randn(2, 12)}
    student = GMSD3Transformer2DModel.from_teacher(teacher, num_gaussians=4)
    print(f"the student starts {difference(student, teacher, prompt):.0e} from its teacher")
    distil(student, teacher, prompt, iterations)
    student.save_pretrained(out)
    student = GMSD3Transformer2DModel.from_pretrained(out).eval()
    print(f"latents {tuple(draw(student, prompt).shape)}, student in {out}")


if __name__ == "__main__":
    main()
