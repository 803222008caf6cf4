"""The whole demo: distil the digits teacher through the DeepSpeed launcher, sample the students, measure, report.

    python -m piflow.digits.demo [--out outputs/digits] [--config configs/digits/nfe1.yaml ...]

is `piflow demo`. Ends with report.json, report.md and samples.png in the output folder, and with a non-zero exit where
a bar is missed.
A student that is finished with the same configuration is kept, and an interrupted training goes on; `--fresh` trains
anew. What stands in the way is moved aside, nothing is deleted.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from piflow.digits.folders import load_network, make_folder, move_aside
from piflow.digits.report import ReportSettings, Sampler, Student, write_report
from piflow.models.dit import GMDiTTransformer2DModelV2
from piflow.models.heads import GMOutput
from piflow.noise_schedule import NoiseSchedule
from piflow.sampler import gm_policy_fn, sample
from piflow.training.config import DistillationConfig, TeacherConfig, TrainConfig, load_config
from piflow.training.errors import ConfigError
from piflow.training.launch import launch_training
from piflow.training.module import load_teacher

Result = TypeVar("Result")


class Stages:
    """Banners with the time since the start, and the seconds each stage took."""

    def __init__(self, console: Console) -> None:
        self.console, self.started, self.seconds = console, time.perf_counter(), dict[str, float]()

    def run(self, title: str, job: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        minutes, seconds = divmod(int(start - self.started), 60)
        self.console.rule(f"[bold]{title}[/bold] (at {minutes}:{seconds:02d})")
        result = job()
        self.seconds[title] = time.perf_counter() - start
        return result


def run_demo(
    configs: Sequence[Path],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    num_processes: int = 2,
    num_samples: int = ReportSettings.num_samples,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train one student per configuration into `out`/<name>, then write the report; returns what it holds.

    A student finished with the same configuration is kept, an interrupted training goes on from its checkpoint, and a
    training with another configuration is moved to `out`/<name>.replaced.1 (2, ...).

    Args:
        configs: files of `piflow.train`; their `output_dir` is replaced.
        overrides: `key=value`, applied to every configuration.
        fresh: train every student anew, and move what is there aside.

    Raises:
        TrainingError: a configuration that cannot be used, or a training that failed.
    """
    console = console or Console()
    stages = Stages(console)
    trainings = {path: out / path.stem for path in configs}
    if len(set(trainings.values())) < len(configs):
        raise ConfigError("Two configurations have the same file name: their students would overwrite each other.")
    loaded = {path: load_config(path, [*overrides, f"output_dir={folder}"]) for path, folder in trainings.items()}
    settings, teacher_config = _common_to(loaded, num_samples)  # wrong files end here, before minutes of training
    make_folder(out)
    source = f" of {teacher_config.path}" if teacher_config.path else ""
    teacher = stages.run(f"load the teacher{source}", partial(load_teacher, teacher_config))

    students: list[Student] = []
    for path, folder in trainings.items():
        nfe = loaded[path].distillation.nfe
        _make_room(folder, loaded[path], fresh, console)
        model = _finished_student(folder, console)
        if model is None:
            arguments = [*overrides, f"output_dir={folder}"]
            stages.run(f"distil {path.stem}", partial(launch_training, path, arguments, num_processes))
            model = load_student(folder / "student")
        else:
            stages.seconds[f"distil {path.stem} (kept from before)"] = 0.0
        taken = any(student.nfe == nfe for student in students)
        name = f"student, {nfe} NFE" + f" ({path.stem})" * taken
        students.append(Student(name, nfe, student_sampler(model, loaded[path].distillation)))

    def report_on_students() -> dict[str, Any]:
        return write_report(
            students,
            out,
            settings,
            teacher=teacher,
            started=stages.started,
            stage_seconds=dict(stages.seconds),
            console=console,
        )

    return stages.run("sample and measure", report_on_students)


def load_student(folder: Path | str) -> GMDiTTransformer2DModelV2:
    """The exported EMA student of a training run, `<output_dir>/student`: in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: no student there; ValueError: its weights are damaged or incomplete. Both say what to do.
    """
    remedy = "Its training writes it at the end, also when a finished one is started again: make demo, or piflow.train."
    return load_network(GMDiTTransformer2DModelV2, folder, "student", remedy)


def student_sampler(model: GMDiTTransformer2DModelV2, distillation: DistillationConfig) -> Sampler:
    """(noise, labels) -> x_0 in `distillation.nfe` network evaluations, on the segments of the training."""
    schedule = NoiseSchedule(shift=distillation.shift)

    def sampler(noise: Tensor, labels: Tensor) -> Tensor:
        def network(x_src: Tensor, sigma_src: Tensor) -> GMOutput:
            return model(x_src, 1000 * sigma_src, labels)

        return sample(
            gm_policy_fn(network),
            noise,
            distillation.nfe,
            schedule=schedule,
            total_substeps=distillation.total_substeps,
            final_step_size_scale=distillation.final_step_size_scale,
        )

    return sampler


def show_report(report: dict[str, Any], out: Path, console: Console) -> bool:
    """Print the rows, the bars and where the files are; true if every bar is met."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)  # narrow: fits 80 columns
    table.add_column("sampler", no_wrap=True)
    for title in ("NFE", "evals", "Fréchet\nteacher", "Fréchet\ndata", "accuracy", "endpoint\nMSE", "samples\nper s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            row["name"],
            str(row["nfe"]),
            str(row["network_evaluations"]),
            f"{row['frechet_to_teacher']:.3f}",
            f"{row['frechet_to_data']:.2f}",
            f"{row['accuracy']:.3f}",
            f"{row['endpoint_mse']:.4f}",
            f"{row['samples_per_second']:.0f}",
            style="bold" if row["kind"] == "student" else None,
        )
    console.print(table)
    for bar in report["bars"]:
        verdict = "[green]met[/green]   " if bar["passed"] else "[red]MISSED[/red]"
        console.print(f"{verdict} {bar['name']}: {bar['value']:.4g} against {bar['bound']:.4g}", soft_wrap=True)
    for name in ("report.md", "report.json", "samples.png"):
        console.print(out / name, soft_wrap=True)
    console.print(f"{report['wall_seconds']:.0f} s in all")
    return all(bar["passed"] for bar in report["bars"])


def _make_room(folder: Path, config: TrainConfig, fresh: bool, console: Console) -> None:
    """Move the folder aside, unless it holds a training with this configuration that may be kept or go on."""
    if not folder.exists():
        return
    try:
        saved = load_config(folder / "config.yaml").model_copy(update={"output_dir": config.output_dir})
    except ConfigError:  # none, or one of another version
        saved = None
    if fresh or saved != config:
        reason = "" if fresh else " holds another training and"
        _say(console, f"{folder}{reason} is moved to {move_aside(folder)}")


def _finished_student(folder: Path, console: Console) -> GMDiTTransformer2DModelV2 | None:
    if not (folder / "student").is_dir():
        return None
    try:
        student = load_student(folder / "student")
    except (OSError, ValueError) as error:  # the training goes on from its last checkpoint and writes it again
        _say(console, str(error), "red")
        return None
    _say(console, f"{folder / 'student'} is finished, with the same configuration: kept (--fresh trains anew)")
    return student


def _common_to(configs: dict[Path, TrainConfig], num_samples: int) -> tuple[ReportSettings, TeacherConfig]:
    """The report samples the teacher as the students saw it, so they must agree on it, its guidance and the shift."""
    if not configs:
        raise ConfigError("Give at least one configuration file.")
    seen = {path: (c.distillation.guidance_scale, c.distillation.shift, c.teacher) for path, c in configs.items()}
    guidance_scale, shift, teacher = next(iter(seen.values()))
    if len(set(seen.values())) > 1:
        values = "; ".join(f"{path}: {scale}, {shift}, ({teacher})" for path, (scale, shift, teacher) in seen.items())
        raise ConfigError(
            f"The students of one report need one guidance_scale, one shift and one teacher, got {values}."
        )
    return ReportSettings(num_samples=num_samples, guidance_scale=guidance_scale, shift=shift), teacher


def _say(console: Console, message: str, style: str | None = None) -> None:
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from piflow.cli import main

    sys.argv.insert(1, "demo")
    main()
