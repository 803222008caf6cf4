"""The digits report: the teacher at several step counts beside few-step students, from the same noises and labels.

`write_report` leaves `report.json`, `report.md` and `samples.png` in a folder.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from piflow.digits.classifier import NUM_FEATURES, DigitsClassifier, accuracy, extract, load_classifier
from piflow.digits.data import IMAGE_SHAPE, NUM_CLASSES, load_digits_images
from piflow.digits.teacher import euler_sample, load_teacher, teacher_velocity
from piflow.evaluation import endpoint_mse, frechet_distance
from piflow.noise_schedule import NoiseSchedule

Sampler = Callable[[Tensor, Tensor], Tensor]  # (noise (B, 1, 8, 8), labels (B,)) -> x_0 (B, 1, 8, 8)

# A student with this NFE must end closer to the reference than the teacher does with so many Euler steps.
STUDENT_BARS = {1: 4, 4: 8}
TEACHER_ACCURACY_BAR = 0.95


@dataclass(frozen=True)
class Student:
    """A few-step sampler to be measured; `sample` makes `nfe` network evaluations per image and is told the labels."""

    name: str
    nfe: int
    sample: Sampler


@dataclass(frozen=True)
class ReportSettings:
    """What is sampled: labels run through the ten classes in turn, noises come from one seeded generator."""

    num_samples: int = 2000
    guidance_scale: float = 2.0
    shift: float = 1.0
    reference_steps: int = 64
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8)
    seed: int = 0
    batch_size: int = 250
    shown_per_class: int = 4

    def __post_init__(self) -> None:
        if self.num_samples < 2 * NUM_CLASSES:
            raise ValueError(f"num_samples must be at least {2 * NUM_CLASSES} (two per class), got {self.num_samples}.")
        if self.batch_size < 1 or self.shown_per_class < 1:
            raise ValueError("batch_size and shown_per_class must be at least 1.")


@dataclass(frozen=True)
class _Method:
    name: str
    kind: str
    nfe: int
    network_evaluations: int
    sample: Sampler


def write_report(
    students: Sequence[Student],
    out: Path | str,
    settings: ReportSettings | None = None,
    *,
    teacher: DiTTransformer2DModel | None = None,
    classifier: DigitsClassifier | None = None,
    started: float | None = None,
    stage_seconds: dict[str, float] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Sample, measure and write report.json, report.md and samples.png into `out`; returns what report.json holds.

    Args:
        students: the samplers to compare with the teacher, in the order of their rows.
        teacher, classifier: default to the weights shipped with the package.
        started: `time.perf_counter()` at the start of the whole job that `wall_seconds` shall cover (default: now).
        stage_seconds: seconds of earlier stages (training), kept in the report.

    Raises:
        ValueError: a student returned a wrong shape or values that are not finite; the message names it.
    """
    settings = settings or ReportSettings()
    started = time.perf_counter() if started is None else started
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    methods = _methods(students, teacher or load_teacher(), settings)
    noise, labels = _noise_and_labels(settings)
    samples, seconds = _sample_all(methods, noise, labels, settings.batch_size, console)

    classifier = classifier or load_classifier()
    images, image_labels = load_digits_images()
    data_features, data_predicted = extract(classifier, images)
    reference_features, _ = extract(classifier, samples[0])
    rows = []
    for method, x_0, row_seconds in zip(methods, samples, seconds):
        features, predicted = extract(classifier, x_0)
        row = {
            "name": method.name,
            "kind": method.kind,
            "nfe": method.nfe,
            "network_evaluations": method.network_evaluations,
            "frechet_to_teacher": frechet_distance(features, reference_features),
            "frechet_to_data": frechet_distance(features, data_features),
            "accuracy": accuracy(predicted, labels),
            "endpoint_mse": endpoint_mse(x_0, samples[0]),
            "samples_per_second": len(x_0) / row_seconds,
            "seconds": row_seconds,
        }
        rows.append(row)
    _draw_samples(out / "samples.png", rows, samples, labels, images, image_labels, settings)

    report = {
        "rows": rows,
        "bars": _bars(rows),
        "settings": asdict(settings),
        "seed": settings.seed,
        "data_accuracy": accuracy(data_predicted, image_labels),
        "stage_seconds": stage_seconds or {},
        "wall_seconds": time.perf_counter() - started,
        "machine": describe_machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy", "scikit-learn")},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(_markdown(report))
    return report


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and the threads torch uses."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _methods(students: Sequence[Student], teacher: DiTTransformer2DModel, settings: ReportSettings) -> list[_Method]:
    """The reference first, then the teacher's few-step rows, then the students."""
    schedule = NoiseSchedule(shift=settings.shift)

    def euler(num_steps: int) -> _Method:
        def sample(noise: Tensor, labels: Tensor) -> Tensor:
            return euler_sample(teacher_velocity(teacher, labels, settings.guidance_scale), noise, num_steps, schedule)

        name = f"teacher, {num_steps} Euler step" + "s" * (num_steps > 1)
        return _Method(name, "teacher", num_steps, 2 * num_steps, sample)  # guidance doubles the batch

    return [
        *(euler(num_steps) for num_steps in (settings.reference_steps, *settings.teacher_steps)),
        *(_Method(student.name, "student", student.nfe, student.nfe, student.sample) for student in students),
    ]


def _noise_and_labels(settings: ReportSettings) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(settings.num_samples, *IMAGE_SHAPE, generator=generator)
    return noise, torch.arange(settings.num_samples) % NUM_CLASSES


@torch.no_grad()
def _sample_all(
    methods: Sequence[_Method], noise: Tensor, labels: Tensor, batch_size: int, console: Console
) -> tuple[list[Tensor], list[float]]:
    """Samples of every method and the seconds each took; one line per method also where no bar can be drawn."""
    columns = (
        TextColumn("{task.description:28}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    samples, seconds = [], []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=len(noise) * sum(method.network_evaluations for method in methods))
        for method in methods:
            progress.update(task, description=method.name)
            method.sample(noise[:2], labels[:2])  # warm-up: allocations and lazy initialisation stay out of the timing
            start, batches = time.perf_counter(), []
            for noise_batch, label_batch in zip(noise.split(batch_size), labels.split(batch_size)):
                batches.append(method.sample(noise_batch, label_batch))
                progress.advance(task, len(noise_batch) * method.network_evaluations)
            seconds.append(time.perf_counter() - start)
            samples.append(_checked(method.name, torch.cat(batches), noise))
            console.print(f"  {method.name:28} {len(noise)} samples in {seconds[-1]:6.2f} s")
    return samples, seconds


def _checked(name: str, x_0: Tensor, noise: Tensor) -> Tensor:
    if x_0.shape != noise.shape:
        raise ValueError(f"{name} returned samples of shape {tuple(x_0.shape)}, expected {tuple(noise.shape)}.")
    wrong = int((~x_0.isfinite()).flatten(1).any(dim=1).sum())
    if wrong:
        raise ValueError(f"{name} returned NaN or infinity in {wrong} of {len(x_0)} samples: its training diverged.")
    return x_0


def _bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the report must show, as far as its rows allow a verdict."""
    teacher = {row["nfe"]: row for row in rows if row["kind"] == "teacher"}
    bars = [
        {
            "name": f"accuracy of {rows[0]['name']} above {TEACHER_ACCURACY_BAR}",
            "value": rows[0]["accuracy"],
            "bound": TEACHER_ACCURACY_BAR,
            "passed": rows[0]["accuracy"] > TEACHER_ACCURACY_BAR,
        }
    ]
    for row in rows:
        steps = STUDENT_BARS.get(row["nfe"])
        if row["kind"] == "student" and steps in teacher:
            bound = teacher[steps]["frechet_to_teacher"]
            bars.append(
                {
                    "name": f"Fréchet to teacher of {row['name']} below that of {teacher[steps]['name']}",
                    "value": row["frechet_to_teacher"],
                    "bound": bound,
                    "passed": row["frechet_to_teacher"] < bound,
                }
            )
    return bars


def _markdown(report: dict[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    reference = report["rows"][0]["name"]
    lines = [
        "# Digits: few-step students beside their teacher",
        "",
        f"{settings['num_samples']} samples per row from the same noises and labels (seed {settings['seed']}), "
        f"guidance {settings['guidance_scale']}, schedule shift {settings['shift']}.",
        "",
        "| sampler | NFE | evaluations | Fréchet to teacher | Fréchet to data | accuracy | endpoint MSE | samples/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['name']} | {row['nfe']} | {row['network_evaluations']} | {row['frechet_to_teacher']:.3f} "
        f"| {row['frechet_to_data']:.3f} | {row['accuracy']:.4f} | {row['endpoint_mse']:.4f} "
        f"| {row['samples_per_second']:.0f} |"
        for row in report["rows"]
    ]
    lines += ["", "## Bars", ""]
    lines += [
        f"- {'met' if bar['passed'] else '**MISSED**'}: {bar['name']} ({bar['value']:.4g} against {bar['bound']:.4g})"
        for bar in report["bars"]
    ]
    lines += [
        "",
        "## What the columns mean",
        "",
        "- NFE: forward passes of the network. Evaluations: the same per image, with guidance counted. A teacher step "
        "is one forward pass with a doubled batch (unconditional and conditional), so two evaluations; a student has "
        "learnt the guided velocity and needs one.",
        f"- Fréchet to teacher: distance between classifier features of the row and of the reference, {reference}. The "
        f"features are {NUM_FEATURES} activations of a small classifier trained on the digits; their scale is its own.",
        "- Fréchet to data: the same against all 1797 scans.",
        f"- Accuracy: how often the classifier sees the requested class (in the data: {report['data_accuracy']:.4f}).",
        "- Endpoint MSE: mean squared pixel difference from the reference, same noise; pixels lie in [-1, 1].",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads. "
        f"Wall time {report['wall_seconds']:.0f} s"
        + "".join(f", {name} {seconds:.0f} s" for name, seconds in report["stage_seconds"].items())
        + ".",
        "",
        "![samples](samples.png)",
        "",
    ]
    return "\n".join(lines)


def _draw_samples(
    file: Path,
    rows: Sequence[dict[str, Any]],
    samples: Sequence[Tensor],
    labels: Tensor,
    images: Tensor,
    image_labels: Tensor,
    settings: ReportSettings,
) -> None:
    """One block per method under a block of real digits; a column holds one class, a place one noise in every block.

    The first samples of each class are shown, none is picked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(settings.shown_per_class, settings.num_samples // NUM_CLASSES)
    blocks = [("real digits", _mosaic(images, image_labels, shown))]
    for row, x_0 in zip(rows, samples):
        caption = f"{row['name']}\nNFE {row['nfe']}   Fréchet {row['frechet_to_teacher']:.2f}"
        blocks.append((caption, _mosaic(x_0, labels, shown)))

    height, width = blocks[0][1].shape
    inches_per_pixel, caption_inches = 0.055, 2.2
    figure = Figure(
        figsize=(caption_inches + width * inches_per_pixel, len(blocks) * (height * inches_per_pixel + 0.15) + 0.5),
        dpi=110,
    )
    FigureCanvasAgg(figure)
    left = caption_inches / figure.get_figwidth()
    axes = figure.subplots(len(blocks), 1, squeeze=False, gridspec_kw={"left": left, "right": 0.995, "bottom": 0.005})[
        :, 0
    ]
    for axis, (caption, mosaic) in zip(axes, blocks):
        axis.imshow(mosaic, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, caption, transform=axis.transAxes, ha="right", va="center", fontsize=11)
    for label in range(NUM_CLASSES):
        place = (label + 0.5) / NUM_CLASSES
        axes[0].text(place, 1.08, str(label), transform=axes[0].transAxes, ha="center", va="bottom", fontsize=12)
    figure.subplots_adjust(top=1 - 0.4 / figure.get_figheight(), hspace=0.08)
    figure.savefig(file)


def _mosaic(images: Tensor, labels: Tensor, shown: int) -> Any:
    """The first `shown` images of each class, two abreast, as one float array; ink +1, gaps -1."""
    abreast = min(shown, 2)
    classes = []
    for label in range(NUM_CLASSES):
        tiles = images[labels == label][:shown, 0].clamp(-1, 1)
        tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=-1)
        lines = [torch.cat(list(line), dim=1) for line in tiles.split(abreast) if len(line) == abreast]
        classes.append(torch.nn.functional.pad(torch.cat(lines), (1, 1, 0, 0), value=-1))
    return torch.cat(classes, dim=1).numpy()
