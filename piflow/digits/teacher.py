"""The digits teacher: class-conditional flow matching with diffusers' DiT transformer at small size.

    x_t = (1 - sigma) x_0 + sigma noise,    u = noise - x_0,    loss = mean |model(x_t, 1000 sigma, label) - u|^2

Train it with `python -m piflow.digits.teacher --out DIR`. The weights in `weights/teacher` came out of that command
with its defaults; the recipe.json beside them says how.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from piflow.digits.data import IMAGE_SHAPE, NULL_CLASS, NUM_CLASSES, check_labels, load_digits_images
from piflow.digits.folders import load_network, make_folder
from piflow.distillation import VelocityFn, flow_matching_loss, guided_teacher
from piflow.noise_schedule import NoiseSchedule

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "teacher"

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class TeacherRecipe:
    """Everything that decides the teacher's weights, apart from the versions of the libraries."""

    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 16
    patch_size: int = 2
    steps: int = 6000
    batch_size: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    adam_beta2: float = 0.99
    gradient_clip: float = 1.0
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if IMAGE_SHAPE[-1] % self.patch_size:
            raise ValueError(f"patch_size must divide the image size {IMAGE_SHAPE[-1]}, got {self.patch_size}.")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}.")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine from `learning_rate` down to zero at `steps`."""
        warmup = min((step + 1) / max(self.warmup_steps, 1), 1.0)
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def build_teacher(recipe: TeacherRecipe) -> DiTTransformer2DModel:
    """A freshly initialised network in evaluation mode, each block starting as the identity (adaLN-zero).

    It stays in evaluation mode in training too: in training mode diffusers' LabelEmbedding drops labels independently
    in every block, which shows the network half-conditional inputs. `train_teacher` drops a sample's label as a whole.
    """
    model = DiTTransformer2DModel(
        num_layers=recipe.num_layers,
        num_attention_heads=recipe.num_attention_heads,
        attention_head_dim=recipe.attention_head_dim,
        patch_size=recipe.patch_size,
        in_channels=IMAGE_SHAPE[0],
        sample_size=IMAGE_SHAPE[-1],
        num_embeds_ada_norm=NUM_CLASSES,
    )
    zero_start = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1, model.proj_out_2]
    for layer in zero_start:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model.eval()


def network_velocity(model: DiTTransformer2DModel, labels: Tensor) -> VelocityFn:
    """The network as a velocity field for fixed labels (B,), the null class among them."""
    return lambda x_t, sigma: model(x_t, timestep=1000 * sigma, class_labels=labels).sample


def train_teacher(
    recipe: TeacherRecipe, on_step: Callable[[int, float], None] | None = None
) -> tuple[DiTTransformer2DModel, list[float]]:
    """Train on all digits by the recipe; returns the EMA network and the loss of every step.

    `on_step(step, loss)` is called after each step. Repeatable for a given recipe, machine and thread count.

    Raises:
        FloatingPointError: the loss, or that of the EMA network at the end, is not finite.
    """
    images, labels = load_digits_images()
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):  # module initialisation draws from the global generator
        torch.manual_seed(recipe.seed)
        model = build_teacher(recipe)
    ema = AveragedModel(model, multi_avg_fn=_warmed_up_ema(recipe.ema_decay))
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.adam_beta2))

    losses: list[float] = []
    schedule = NoiseSchedule()
    strata = torch.arange(recipe.batch_size)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        index = torch.randint(len(images), (recipe.batch_size,), generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.label_dropout
        sigma = (strata + torch.rand(recipe.batch_size, generator=generator)) / recipe.batch_size  # stratified uniform
        noise = torch.randn(recipe.batch_size, *IMAGE_SHAPE, generator=generator)

        velocity = network_velocity(model, labels[index].masked_fill(dropped, NULL_CLASS))
        loss = flow_matching_loss(velocity, images[index], schedule, loss_scale=2.0, raw_t=sigma, noise=noise).loss
        _check_finite(loss, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    with torch.no_grad():  # the last step may have broken what no loss has seen yet
        loss = flow_matching_loss(network_velocity(ema.module, labels), images, schedule, generator=generator).loss
    _check_finite(loss, recipe.steps)
    return ema.module, losses


def save_teacher(
    model: DiTTransformer2DModel, recipe: TeacherRecipe, losses: list[float], seconds: float, out: Path
) -> None:
    """Write a diffusers folder (config.json, safetensors) and recipe.json, the account of how the weights were made."""
    images, _ = load_digits_images()
    model.save_pretrained(out)
    account = {
        "command": "python -m piflow.digits.teacher",
        "recipe": asdict(recipe),
        "data": "scikit-learn load_digits, all 1797 images, x_0 = pixel / 8 - 1",
        "objective": "u = noise - x_0 at x_t = (1 - sigma) x_0 + sigma noise; timestep 1000 sigma; sigma uniform",
        "zero_predictor_loss": 1 + images.square().mean().item(),
        "first_loss": losses[0],
        "final_loss": _tail_mean(losses),
        "loss_curve": {step: round(losses[step], 4) for step in range(0, len(losses), max(len(losses) // 20, 1))},
        "train_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "scikit-learn", "numpy")},
    }
    (out / "recipe.json").write_text(json.dumps(account, indent=2) + "\n")


def load_teacher(path: Path | str | None = None) -> DiTTransformer2DModel:
    """The teacher in a folder written by the training command (default: the weights shipped with the package).

    Returns the network in evaluation mode, without gradients, float32 on the CPU.

    Raises:
        FileNotFoundError: the folder holds no teacher; the message says how to make one.
        ValueError: the weights are damaged or do not fit their config.json.
    """
    folder = SHIPPED_WEIGHTS if path is None else Path(path)
    remedy = f"Train one: python -m piflow.digits.teacher --out {folder}"
    return load_network(DiTTransformer2DModel, folder, "digits teacher", remedy)


def teacher_velocity(model: DiTTransformer2DModel, labels: Tensor, guidance_scale: float) -> VelocityFn:
    """The guided teacher as a velocity field (x_t (B, C, H, W), sigma (B,)) -> u (B, C, H, W), without gradients.

        u = u_uncond + guidance_scale (u_cond - u_uncond),    both from one forward pass with a doubled batch

    Args:
        labels: (B,) int64 in 0..9.

    Raises:
        ValueError: a label is out of range; from the field: x_t or sigma does not fit the network and the labels.
    """
    null_class = model.config.num_embeds_ada_norm
    check_labels(labels, null_class)

    def conditional(x_t: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        return network_velocity(model, cond)(x_t, sigma)

    guided = guided_teacher(conditional, labels, torch.full_like(labels, null_class), guidance_scale)
    shape = (len(labels), model.config.in_channels, model.config.sample_size, model.config.sample_size)

    @torch.no_grad()
    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        for name, given, expected in (("x_t", x_t, shape), ("sigma", sigma, shape[:1])):
            if given.shape != expected:
                raise ValueError(
                    f"{name} must have shape {expected} for {len(labels)} labels and this network, "
                    f"got {tuple(given.shape)}."
                )
        return guided(x_t, sigma)

    return velocity


def euler_sample(velocity: VelocityFn, noise: Tensor, num_steps: int, schedule: NoiseSchedule) -> Tensor:
    """Integrate dx/dsigma = u from noise (B, C, *S) at sigma = 1 to x_0, in Euler steps uniform in raw time."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    sigmas = schedule.sigma(torch.linspace(1, 0, num_steps + 1, dtype=noise.dtype))
    x_t = noise
    for sigma, sigma_next in pairwise(sigmas):
        x_t = x_t + (sigma_next - sigma) * velocity(x_t, sigma.expand(len(x_t)))
    return x_t


def _warmed_up_ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An average over about a tenth of the steps so far until that reaches 1 / (1 - decay): the start is forgotten."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, max(1 - decay, 9 / (10 + int(num_averaged))))

    return update


def _check_finite(loss: Tensor, steps: int) -> None:
    if not loss.isfinite():
        raise FloatingPointError(f"The teacher's loss is {loss.item()} after {steps} steps: lower learning_rate.")


def _tail_mean(losses: list[float], count: int = 100) -> float:
    tail = losses[-count:]
    return sum(tail) / len(tail)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m piflow.digits.teacher", description="Train the digits teacher.")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json, the weights and recipe.json")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    for field in fields(TeacherRecipe):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    arguments = vars(parser.parse_args(argv))
    out, threads = arguments.pop("out"), arguments.pop("threads")
    try:
        recipe = TeacherRecipe(**arguments)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads must be at least 1, got {threads}.")
            torch.set_num_threads(threads)
    except ValueError as error:
        parser.error(str(error))
    try:
        _train_and_save(recipe, make_folder(out))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _train_and_save(recipe: TeacherRecipe, out: Path) -> None:
    columns = (
        TextColumn("teacher"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns) as progress:
        task = progress.add_task("teacher", total=recipe.steps, loss=float("nan"))
        smooth: list[float] = []

        def on_step(step: int, loss: float) -> None:
            smooth.append(loss)
            progress.update(task, completed=step, loss=_tail_mean(smooth))
            if not progress.console.is_terminal and step % max(recipe.steps // 20, 1) == 0:  # no bar in a log file
                progress.console.print(f"step {step} of {recipe.steps}, loss {_tail_mean(smooth):.4f}")

        model, losses = train_teacher(recipe, on_step)
    seconds = time.perf_counter() - start
    save_teacher(model, recipe, losses, seconds, out)
    print(f"Teacher saved in {out}: loss {losses[0]:.3f} -> {_tail_mean(losses):.3f} in {seconds:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
