"""From what a person asked for to pictures, their settings, and the way they came about. Knows no web page."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps

import piflow
from piflow.apps.latents import Trajectory, decode, start_noise
from piflow.apps.sizes import LONGEST_SIDE, too_large

from .models import DigitsModel, Model, Network, TextModel

MOST_STEPS = 64
MOST_DIGITS = 20
DIGITS_IN_A_ROW = 5
LARGEST_SEED = 2**32 - 1


class Stopped(Exception):
    """The person has asked to stop."""


@dataclass(frozen=True)
class Request:
    """What somebody asks for, as it comes from the page: nothing is checked yet.

    prompt: of the digits model, the digits. width, height: in pixels; of the digits model, `width` is that of a digit.
    references: pictures to change. trajectory: also show the steps.
    """

    prompt: str
    seed: float | None = 0
    width: float | None = 1024
    height: float | None = 1024
    nfe: float | None = 4
    total_substeps: float | None = 128
    temperature: float | Literal["auto"] = "auto"
    references: list[Image.Image] = field(default_factory=list)
    trajectory: bool = True


@dataclass(frozen=True)
class Picture:
    """What came of it: the picture, its settings, and after each step (noise level, where it was heading)."""

    image: Image.Image
    settings: dict[str, Any]
    steps: list[tuple[float, Image.Image]]
    evaluations: int
    seconds: float


OnStep = Callable[[int, int], None]
"""(steps done, steps in all); what it raises ends the picture."""


def draw(model: Model, network: Network, request: Request, on_step: OnStep = lambda done, steps: None) -> Picture:
    """A picture by the model's student or base: the same request is the same picture, whoever else is drawing.

    Raises a ValueError that says, for people, what cannot be.
    """
    seed = whole("Seed", request.seed, 0, LARGEST_SEED)
    nfe = whole("Steps", request.nfe, 1, MOST_STEPS)
    total_substeps = whole("Substeps", request.total_substeps, 1, 1024)
    subject, width, height = asked(model, request)
    policy = {"total_substeps": total_substeps, "temperature": request.temperature}
    arguments: dict[str, Any] = policy if network == "student" else model.base_arguments

    generator = torch.Generator().manual_seed(seed)
    with model.using(network) as pipe:
        start = time.perf_counter()
        batch = len(subject["class_labels"]) if isinstance(model, DigitsModel) else 1
        noise = start_noise(pipe, width, height, generator, batch)
        trajectory = Trajectory(noise)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, nfe)
            return trajectory(pipe, step, timestep, tensors) if request.trajectory else {}

        on_step(0, nfe)
        images = pipe(
            **subject,
            **arguments,
            latents=noise,
            generator=generator,
            num_inference_steps=nfe,
            callback_on_step_end=after_step,
        ).images
        seconds = time.perf_counter() - start
        heading = [(sigma, decode(pipe, x_0, width, height)) for sigma, x_0 in trajectory.predictions]
        pipe.maybe_free_model_hooks()
        dtype = str(pipe.transformer.dtype).removeprefix("torch.")

    def arranged(images: list[Image.Image]) -> Image.Image:
        return sheet(images, width) if isinstance(model, DigitsModel) else images[0]

    image = arranged(images)
    settings = {
        "class" if isinstance(model, DigitsModel) else "prompt": subject.get("class_labels", request.prompt.strip()),
        "seed": seed,
        "piflow": piflow.__version__,
        "model": model.base,
        "adapter": model.adapter if network == "student" else None,
        "nfe": nfe,
        **arguments,
        **({"references": len(request.references)} if request.references else {}),
        "dtype": dtype,
        "size": list(image.size),
    }
    steps = [(sigma, arranged(images)) for sigma, images in heading]
    return Picture(image, settings, steps, model.evaluations(network, nfe), seconds)


def asked(model: Model, request: Request) -> tuple[dict[str, Any], int, int]:
    """The pipeline's arguments that say what to draw, and width and height."""
    text = request.prompt.strip()
    if isinstance(model, DigitsModel):
        labels = digits(text)
        side = whole("Size", request.width, 8, 256)
        if side % 8:
            raise ValueError(
                f"Size: {side} is no multiple of 8; next to it are {side // 8 * 8} and {side // 8 * 8 + 8}."
            )
        return {"class_labels": labels}, side, side
    assert isinstance(model, TextModel)
    if not text:
        raise ValueError("The prompt is empty: say what the picture should show.")
    width, height = (
        pixels(name, side, model.multiple) for name, side in (("Width", request.width), ("Height", request.height))
    )
    arguments: dict[str, Any] = {"prompt": text, "width": width, "height": height}
    return arguments | ({"image": request.references} if request.references else {}), width, height


def digits(text: str) -> list[int]:
    """ "3 1 4" -> [3, 1, 4]. Raises ValueError for anything else."""
    found = text.replace(" ", "").replace(",", "")
    if not found:
        raise ValueError("There is nothing to draw: type digits, such as 31415.")
    if not (found.isascii() and found.isdecimal()):
        raise ValueError("This model draws the digits 0 to 9 and nothing else: type digits, such as 31415.")
    if len(found) > MOST_DIGITS:
        raise ValueError(f"At most {MOST_DIGITS} digits at a time, got {len(found)}.")
    return [int(digit) for digit in found]


def whole(name: str, value: float | None, least: int, most: int) -> int:
    """The number as an int. Raises ValueError that names the control."""
    if value is None:
        raise ValueError(f"{name} is empty: give a whole number from {least} to {most}.")
    if value % 1 or not least <= value <= most:
        given = f"{value:.0f}" if value % 1 == 0 else value
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {given}.")
    return int(value)


def pixels(name: str, value: float | None, multiple: int) -> int:
    """A width or height that divides into the model's tokens. Raises ValueError that names the control."""
    if value is not None and value > LONGEST_SIDE:
        raise ValueError(too_large(name, value))
    side = whole(name, value, multiple, LONGEST_SIDE)
    if side % multiple:
        below = side // multiple * multiple
        raise ValueError(f"{name}: {side} is no multiple of {multiple}; next to it are {below} and {below + multiple}.")
    return side


def reference(path: str | Path) -> Image.Image:
    """An uploaded picture as people see it: upright as its camera says, on white where it is transparent.

    Raises ValueError that names a file which is no picture.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{Path(path).name} cannot be read as a picture: take a whole PNG, JPEG or WebP file."
        ) from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def sheet(images: list[Image.Image], side: int) -> Image.Image:
    """Small pictures enlarged to `side` pixels without smoothing, in rows of up to five with a gap between."""
    gap, columns = max(side // 16, 1), min(len(images), DIGITS_IN_A_ROW)
    rows = -(-len(images) // columns)
    paper = Image.new("L", (columns * (side + gap) - gap, rows * (side + gap) - gap), 255)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.convert("L").resize((side, side), Image.Resampling.NEAREST)
        paper.paste(enlarged, (column * (side + gap), row * (side + gap)))
    return paper
