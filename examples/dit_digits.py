"""Class-conditional DiT in pixel space, on the CPU and without a download: the digits teacher and its students."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from piflow.digits.teacher import load_teacher
from piflow.models import GMDiTTransformer2DModelV2
from piflow.pipelines import PiDiTPipeline

STUDENT = Path("outputs/digits/nfe4/student")  # what `make demo` leaves


def load(student: Path = STUDENT) -> PiDiTPipeline:
    """A distilled student, or, before there is one, a student that has only been initialised from its teacher."""
    if student.is_dir():
        transformer = GMDiTTransformer2DModelV2.from_pretrained(student)
    else:
        transformer = GMDiTTransformer2DModelV2.from_teacher(load_teacher())
    return PiDiTPipeline(transformer, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())


def sheet(pipe: PiDiTPipeline, rows: int = 8, size: int = 8, zoom: int = 4, **arguments: float) -> Image.Image:
    """A row of the ten classes for each of `rows` seeds, enlarged."""
    paper = Image.new("L", (10 * size * zoom, rows * size * zoom))
    for row in range(rows):
        images = pipe(list(range(10)), generator=torch.Generator().manual_seed(row), **arguments).images
        for column, image in enumerate(images):
            tile = image.resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            paper.paste(tile, (column * size * zoom, row * size * zoom))
    return paper


if __name__ == "__main__":
    pipe = load()
    sheet(pipe, num_inference_steps=4).save("digits_student.png")
    pipe.transformer = load_teacher()
    sheet(pipe, num_inference_steps=32, guidance_scale=2.0).save("digits_teacher.png")
