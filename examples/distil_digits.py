"""pi-ID in one plain file: distil the digits teacher into a student of one to four steps, and look at its digits.

    python examples/distil_digits.py [--nfe 4] [--iterations 1000] [--out digits_student.png]

To be read from top to bottom. It is what `piflow train configs/digits/nfe4.yaml` does, without DeepSpeed, checkpoints
and logs: for a network that fits on one device, this is all there is to it (pi-Flow, arXiv 2510.14974, algorithm 1).
"""

import argparse

import torch
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from piflow.digits.data import IMAGE_SHAPE, NUM_CLASSES, load_digits_images
from piflow.digits.teacher import euler_sample, load_teacher, teacher_velocity
from piflow.distillation import ImitationConfig, imitation_segment, sample_source_times
from piflow.models import GMDiTTransformer2DModelV2
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import GMFlowPolicy
from piflow.sampler import gm_policy_fn, sample
from piflow.training.ema import karras_momentum, update_average

GUIDANCE = 2.0  # the student learns the guided teacher: guidance costs nothing when it samples
SUBSTEPS = 64  # of the policy, over the whole of time; they need no network
SCHEDULE = NoiseSchedule()  # raw time is the noise level


def distil(nfe: int, iterations: int, batch_size: int = 64, seed: int = 0) -> GMDiTTransformer2DModelV2:
    """The averaged student after `iterations` steps of pi-ID on real digits."""
    torch.manual_seed(seed)
    images, labels = load_digits_images()  # (1797, 1, 8, 8) in [-1, 1], and 0..9
    teacher = load_teacher()
    # The teacher's weights, with the last layer widened to a mixture of 8 velocities for each pixel.
    student = GMDiTTransformer2DModelV2.from_teacher(teacher, num_gaussians=8).train()
    average = AveragedModel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    imitation = ImitationConfig(nfe=nfe, total_substeps=SUBSTEPS, num_intermediate_states=2, policy_dropout=0.05)

    for iteration in range(iterations):
        index = torch.randint(len(images), (batch_size,))
        x_0, condition = images[index], labels[index]

        # Where a segment starts: one of the `nfe` levels for each sample, the data mixed with that much noise.
        source = sample_source_times(batch_size, imitation, SCHEDULE)
        x_src = torch.lerp(x_0, torch.randn_like(x_0), source.sigma.reshape(-1, 1, 1, 1))

        # One evaluation of the student's network gives a policy: velocities for the whole segment.
        policy = GMFlowPolicy(*student(x_src, 1000 * source.sigma, condition), x_src, source.sigma)

        # Follow the policy, ask the teacher for its velocity at the states reached, and regress the policy onto it. The
        # teacher is asked where the student goes by itself, so that it learns to correct its own errors.
        velocity = teacher_velocity(teacher, condition, GUIDANCE)
        result = imitation_segment(policy, velocity, source, SCHEDULE, imitation)

        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((iteration + 1) / 50, 1)
        optimizer.step()
        update_average(average.module.parameters(), student.parameters(), karras_momentum(iteration, gamma=7.0))
        if iteration % 100 == 0 or iteration == iterations - 1:
            print(f"iteration {iteration:5d}   loss {result.loss.item():.4f}")
    return average.module.eval()


def draw(student: GMDiTTransformer2DModelV2, noise: Tensor, labels: Tensor, nfe: int) -> Tensor:
    """Digits (B, 1, 8, 8) from noise, in `nfe` evaluations of the network."""

    def network(x_src: Tensor, sigma_src: Tensor) -> tuple[Tensor, ...]:
        return tuple(student(x_src, 1000 * sigma_src, labels))

    return sample(gm_policy_fn(network), noise, nfe, schedule=SCHEDULE, total_substeps=SUBSTEPS)


def contact_sheet(rows: list[Tensor], zoom: int = 6) -> Image.Image:
    """Rows of digits (B, 1, 8, 8), enlarged, a pixel apart."""
    tiles = torch.nn.functional.pad(torch.stack(rows)[:, :, 0], (1, 1, 1, 1), value=-1)
    pixels = torch.cat([torch.cat(list(row), dim=1) for row in tiles])
    image = Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil the digits teacher; see the file.")
    parser.add_argument("--nfe", type=int, default=4, help="network evaluations of the student (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=1000, help="default: %(default)s, minutes on a CPU")
    parser.add_argument("--out", default="digits_student.png", help="default: %(default)s")
    arguments = parser.parse_args()

    student = distil(arguments.nfe, arguments.iterations)
    labels = torch.arange(2 * NUM_CLASSES) % NUM_CLASSES
    noise = torch.randn(len(labels), *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))
    few_steps = draw(student, noise, labels, arguments.nfe)
    teacher = teacher_velocity(load_teacher(), labels, GUIDANCE)
    coarse, reference = (euler_sample(teacher, noise, steps, SCHEDULE) for steps in (arguments.nfe, 64))
    for name, digits in ((f"student, {arguments.nfe} NFE", few_steps), (f"teacher, {arguments.nfe} steps", coarse)):
        error = (digits - reference).square().mean()
        print(f"{name}: mean squared distance from the teacher's 64 steps {error:.4f}")
    contact_sheet([reference, few_steps, coarse]).save(arguments.out)
    print(f"{arguments.out}: teacher in 64 steps, student, teacher in {arguments.nfe}")


if __name__ == "__main__":
    main()
