"""`piflow evaluate`: samples against a reference and against their teacher."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piflow.commands.common import (
    AsJson,
    Device,
    json_object,
    progress,
    quiet_libraries,
    told,
    usable_device,
    whole_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from piflow.evaluation.extractors import Clip, Extractor
    from piflow.evaluation.report import Report
    from piflow.evaluation.run import Run
    from piflow.evaluation.sources import Source

MODELS, FEATURES, RUNNING = "What models are asked for", "What images are compared by", "How it runs"


class FeatureKind(StrEnum):
    inception = "inception"
    digits = "digits"
    clip = "clip"
    pixels = "pixels"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def evaluate(
    samples: Annotated[
        list[str],
        typer.Argument(
            help="Folder of images, or file of them (.npz, .npy, .safetensors, .pt), each one run; or the folder of a "
            "student, pipeline or adapter; or digits:teacher.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="Images to compare with: folder, file (ADM's .npz with mu and sigma too) or digits:data."),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Model, folder or file of the teacher: image i comes from the same noise as sample i."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.md.")] = Path("outputs/evaluation"),
    features: Annotated[
        FeatureKind | None, typer.Option(help="By default inception, with --inception.", rich_help_panel=FEATURES)
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="File with the weights of FID's Inception.", rich_help_panel=FEATURES)
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model, for the CLIP score.", rich_help_panel=FEATURES)
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Such as fid,precision. By default all that are possible.", rich_help_panel=FEATURES),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Images for each seed.", rich_help_panel=MODELS)] = 1000,
    seeds: Annotated[str, typer.Option(help="Such as 0-2 or 0,5: one run each.", rich_help_panel=MODELS)] = "0",
    nfe: Annotated[
        int | None, typer.Option(min=1, help="Network evaluations of an image.", rich_help_panel=MODELS)
    ] = None,
    teacher_nfe: Annotated[
        int | None, typer.Option(min=1, help="Steps of the teacher.", rich_help_panel=MODELS)
    ] = None,
    call: Annotated[
        str, typer.Option(help="More arguments, such as '{\"guidance_scale\": 2}'.", rich_help_panel=MODELS)
    ] = "{}",
    teacher_call: Annotated[str, typer.Option(help="The same for the teacher.", rich_help_panel=MODELS)] = "{}",
    classes: Annotated[
        str | None, typer.Option(help="Such as 0-9, in turn. By default all.", rich_help_panel=MODELS)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Text file or JSONL, in turn; also for images in folders.", rich_help_panel=MODELS),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pipeline that an adapter extends.", rich_help_panel=MODELS)] = None,
    vae: Annotated[str | None, typer.Option(help="VAE behind a DiT in latents.", rich_help_panel=MODELS)] = None,
    dtype: Annotated[DType, typer.Option(help="Of a pipeline's weights.", rich_help_panel=MODELS)] = DType.float32,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.", rich_help_panel=RUNNING)] = 64,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images whose features are saved at once.", rich_help_panel=RUNNING)
    ] = 1024,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for features. By default OUT/features.", rich_help_panel=RUNNING)
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """FID and its like, and how close a student is to its teacher, with confidence intervals over seeds.

    An evaluation that was stopped goes on where it was; a finished one is repeated to the bit.
    """
    with told(), quiet_libraries():
        from piflow.evaluation import run as evaluation
        from piflow.evaluation.sources import open_source, read_statistics

        device = usable_device(device)
        extractor, scorer = _networks(features, inception, clip, device)
        asked = {"base": base, "vae": vae, "dtype": dtype, "device": device}
        chosen = {"seeds": whole_numbers("--seeds", [seeds]), "count": num_samples}
        conditions = {"classes": classes, "prompts": prompts}
        ours = [_sources(path, _arguments("--call", call, nfe), asked, chosen, conditions) for path in samples]
        theirs = [
            _sources(path, _arguments("--teacher-call", teacher_call, teacher_nfe), asked, chosen, conditions)
            for path in teacher or ()
        ]
        ready = reference is not None and extractor.name == "inception"  # whose features the statistics are of
        statistics = read_statistics(reference) if reference is not None and ready else None
        against = None if reference is None or (statistics and not _has_images(reference)) else open_source(reference)
        with progress() as bars:
            tasks: dict[str, Any] = {}

            def show(title: str, done: int, count: int) -> None:
                if title not in tasks:
                    tasks[title] = bars.add_task(title, total=count)
                bars.update(tasks[title], completed=done)

            try:
                report = evaluation.evaluate(
                    _runs([s for group in ours for s in group], [s for group in theirs for s in group], prompts),
                    extractor,
                    cache or out / "features",
                    reference=against,
                    statistics=statistics,
                    clip=scorer,
                    metrics=None if metrics is None else [name.strip() for name in metrics.split(",")],
                    options=evaluation.Options(batch_size, shard_size, device),
                    progress=show,
                )
            except KeyboardInterrupt:
                print("piflow: stopped. What is finished is kept: run the same command again.", file=sys.stderr)
                raise typer.Exit(130) from None
        report.write(out)
    _tell(report, out, as_json)


def _networks(
    features: FeatureKind | None, inception: Path | None, clip: Path | None, device: str
) -> tuple[Extractor, Clip | None]:
    from piflow.evaluation import extractors
    from piflow.evaluation.inception import WEIGHTS

    if features is None and inception is None:
        raise ValueError(
            "--features: say what images are compared by: inception (with --inception WEIGHTS), digits, clip or pixels."
        )
    scorer = None if clip is None else extractors.Clip(clip, device)
    if features == FeatureKind.digits:
        return extractors.digits_extractor(device=device), scorer
    if features == FeatureKind.pixels:
        return extractors.pixel_extractor(), scorer
    if features == FeatureKind.clip:
        if scorer is None:
            raise ValueError("--features clip needs the folder of the CLIP model: --clip FOLDER.")
        return scorer.extractor(), scorer
    if inception is None:
        raise ValueError(
            f"--features inception needs a file of weights: --inception {WEIGHTS}, a release file of the project "
            "torch-fidelity."
        )
    return extractors.inception_extractor(inception, device), scorer


def _arguments(option: str, text: str, nfe: int | None) -> dict[str, Any]:
    return json_object(option, text) | ({} if nfe is None else {"num_inference_steps": nfe})


def _sources(
    path: str,
    arguments: dict[str, Any],
    asked: dict[str, Any],
    chosen: dict[str, Any],
    conditions: dict[str, str | None],
) -> Sequence[Source]:
    """One source for each seed of a model, one of a folder or file."""
    import torch

    from piflow.evaluation.models import ModelSource, is_model, open_model
    from piflow.evaluation.sources import open_source

    if not is_model(path):
        return [open_source(path)]
    known = asked | {"dtype": getattr(torch, asked["dtype"])}
    model = open_model(path, **known)
    turn: list[Any]
    if model.texts:
        from piflow.data.prompts import read_prompts

        if conditions["prompts"] is None:
            raise ValueError(f"{path} takes prompts: give a file of them with --prompts.")
        turn = read_prompts(conditions["prompts"]).texts
    else:
        wanted = conditions["classes"]
        turn = list(range(model.classes)) if wanted is None else whole_numbers("--classes", [wanted])
        if max(turn) >= model.classes:
            raise ValueError(f"--classes: {path} has classes 0 to {model.classes - 1}, got {max(turn)}.")
    return [ModelSource(model, turn, seed, chosen["count"], arguments) for seed in chosen["seeds"]]


def _runs(samples: Sequence[Source], teachers: Sequence[Source], prompts: str | None) -> list[Run]:
    from piflow.data.prompts import read_prompts
    from piflow.evaluation.run import Run

    texts = None
    if prompts is not None and not all(getattr(source, "texts", False) for source in samples):
        texts = read_prompts(prompts).texts
    if teachers and len(teachers) not in (1, len(samples)):
        raise ValueError(f"--teacher: expected one, or one for each of {len(samples)} runs, got {len(teachers)}.")
    paired: Sequence[Source | None] = list(teachers) * (len(samples) if len(teachers) == 1 else 1) or [None] * len(
        samples
    )
    return [Run(ours, theirs, texts) for ours, theirs in zip(samples, paired)]


def _has_images(path: str) -> bool:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return "arr_0" in file.files


def _tell(report: Report, out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json(), nl=False)
        return
    from rich.console import Console
    from rich.table import Table

    content, console = report.content, Console(highlight=False, markup=False)
    table = Table("metric", box=None, padding=(0, 2, 0, 0))
    table.add_column("mean", justify="right")
    table.add_column(content["confidence"] or "one run")
    for name, found in content["metrics"].items():
        interval = "" if found["low"] is None else f"{found['low']:.5g} to {found['high']:.5g}"
        table.add_row(name, f"{found['mean']:.5g}", interval)
    console.print(table)
    for warning in content["warnings"]:
        console.print(warning, soft_wrap=True)
    if content["left_out"]:
        console.print(f"Not measured: {', '.join(content['left_out'])} (why: {out / 'results.md'}).", soft_wrap=True)
    console.print(f"Written to {out / 'results.json'} and results.md.", soft_wrap=True)
