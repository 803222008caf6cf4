"""The whole demo: distil the digits teacher through the DeepSpeed launcher, sample the students, measure, report.

    python -m piflow.digits.demo [--out outputs/digits] [--configs configs/digits/nfe1.yaml ...]

Ends with report.json, report.md and samples.png in the output folder, and with a non-zero exit where a bar is missed.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiTTransformer2DModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from piflow.digits.report import ReportSettings, Sampler, Student, write_report
from piflow.digits.teacher import load_teacher
from piflow.models.dit import GMDiTTransformer2DModelV2, GMOutput
from piflow.noise_schedule import NoiseSchedule
from piflow.sampler import gm_policy_fn, sample
from piflow.training.config import DistillationConfig, TrainConfig, load_config
from piflow.training.errors import ConfigError, TrainingError
from piflow.training.launch import launch_training

DEFAULT_CONFIGS = tuple(Path("configs/digits") / f"nfe{nfe}.yaml" for nfe in (1, 2, 4))


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
    console: Console | None = None,
) -> dict[str, Any]:
    """Train one student per configuration into `out`/<name>, then write the report; returns what it holds.

    A training that was interrupted goes on from its checkpoint; one that had finished is removed and done again.

    Args:
        configs: files of `piflow.train`; their `output_dir` is replaced.
        overrides: `key=value`, applied to every configuration.

    Raises:
        TrainingError: a configuration that cannot be used, or a training that failed.
    """
    console = console or Console()
    stages = Stages(console)
    trainings = {path: out / path.stem for path in configs}
    if len(set(trainings.values())) < len(configs):
        raise ConfigError("Two configurations have the same file name: their students would overwrite each other.")
    loaded = {path: load_config(path, [*overrides, f"output_dir={folder}"]) for path, folder in trainings.items()}
    settings = _settings_of(loaded, num_samples)  # wrong files end here, before minutes of training
    teacher = stages.run("load the teacher", load_teacher)

    students: list[Student] = []
    for path, folder in trainings.items():
        nfe = loaded[path].distillation.nfe
        if (folder / "student").is_dir():
            shutil.rmtree(folder)
        arguments = [*overrides, f"output_dir={folder}"]
        stages.run(f"distil {path.stem}", partial(launch_training, path, arguments, num_processes))
        model = load_student(folder / "student")
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


def load_student(folder: Path) -> GMDiTTransformer2DModelV2:
    """The exported EMA student of a training run, in evaluation mode and without gradients."""
    if not (folder / "config.json").is_file():
        raise TrainingError(f"The training left no student in {folder}: its messages above say why.")
    model: DiTTransformer2DModel = GMDiTTransformer2DModelV2.from_pretrained(folder, low_cpu_mem_usage=False)
    return model.eval().requires_grad_(False)


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


def _settings_of(configs: dict[Path, TrainConfig], num_samples: int) -> ReportSettings:
    """The report samples the teacher as the students saw it, so they must agree on guidance and shift."""
    if not configs:
        raise ConfigError("Give at least one configuration file.")
    seen = {(config.distillation.guidance_scale, config.distillation.shift) for config in configs.values()}
    if len(seen) > 1:
        values = ", ".join(
            f"{path}: {config.distillation.guidance_scale} and {config.distillation.shift}"
            for path, config in configs.items()
        )
        raise ConfigError(f"The students of one report need one guidance_scale and one shift, got {values}.")
    guidance_scale, shift = seen.pop()
    return ReportSettings(num_samples=num_samples, guidance_scale=guidance_scale, shift=shift)


def _complain(console: Console, message: str) -> None:
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m piflow.digits.demo", description="Distil, sample, measure, report."
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/digits"), help="default: %(default)s")
    parser.add_argument(
        "--configs", type=Path, nargs="+", default=DEFAULT_CONFIGS, help="default: configs/digits/nfe*.yaml"
    )
    parser.add_argument("--num-processes", type=int, default=2, help="ranks of the launcher (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=ReportSettings.num_samples, help="default: %(default)s")
    parser.add_argument(
        "--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for every training"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        report = run_demo(
            arguments.configs,
            arguments.out,
            overrides=arguments.overrides,
            num_processes=arguments.num_processes,
            num_samples=arguments.num_samples,
            console=console,
        )
    except TrainingError as error:
        _complain(console, str(error))
        return error.exit_code
    except (ValueError, OSError, RuntimeError) as error:
        _complain(console, f"The demo stopped: {error}")
        return 1
    except KeyboardInterrupt:
        _complain(console, "Interrupted. Run the command again.")
        return 130
    return 0 if show_report(report, arguments.out, console) else 1


if __name__ == "__main__":
    sys.exit(main())
