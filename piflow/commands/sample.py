"""`piflow sample`: pictures of a pipeline, a student or the digits, as PNG files that say how they were made."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import piflow
from piflow.apps.sizes import LONGEST_SIDE, too_large
from piflow.commands.common import (
    AsJson,
    Device,
    UsageError,
    progress,
    quiet_libraries,
    told,
    usable_device,
    whole_numbers,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from piflow.commands.sources import Model


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def sample(
    model: Annotated[
        str,
        typer.Argument(
            help="digits, which needs no download; folder or repository of a diffusers pipeline; folder of a "
            "class-conditional student, training or checkpoint."
        ),
    ] = "digits",
    prompt: Annotated[list[str] | None, typer.Option(help="What is to be seen (repeatable).")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="N", help="Classes: 3, 1,4 or 0-9. By default, of ten, all.")
    ] = None,
    seed: Annotated[list[str], typer.Option(metavar="N", help="Seeds: 3, 1,4 or 0-9.")] = ["0"],  # noqa: B006
    adapter: Annotated[
        str | None, typer.Option(help="Folder or repository of an adapter, or a training or checkpoint of one.")
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder in the adapter's.")] = None,
    nfe: Annotated[
        int | None, typer.Option(min=1, help="Network evaluations. By default what the student was trained for.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help=f"Pixels, such as 1664x928 or 1024, at most {LONGEST_SIDE} a side. By default the pipeline's.",
        ),
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option(help="Of a GM student's mixture: a number, auto or none; else the pipeline's own."),
    ] = None,
    substeps: Annotated[
        int | None, typer.Option(min=1, help="Policy substeps over the whole of time (default: the training's, 128).")
    ] = None,
    h: Annotated[str | None, typer.Option(metavar="H", help="Noise between the steps: 0 (none) to inf.")] = None,
    shift: Annotated[
        float | None, typer.Option(min=0, help="Timestep shift. By default the training's or published one.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="By default off for students.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    vae: Annotated[str | None, typer.Option(help="VAE of a student that makes latents.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; numbers go on from what is in it.")] = Path("samples"),
    dtype: Annotated[
        DType | None, typer.Option(help="Of the networks. By default bfloat16 on a GPU, float32 elsewhere.")
    ] = None,
    device: Device = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the network at work.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make pictures, one for each prompt or class and seed, and a grid of them, as PNG files.

    Every file holds the settings that it was made with (`piflow inspect FILE.png`), and the picture depends on these
    alone, not on what else was asked for.
    """
    started = time.perf_counter()
    with told(), redirect_stdout(sys.stderr), ExitStack() as stack:
        seeds, labels = whole_numbers("--seed", seed), whole_numbers("--class", classes) if classes else None
        call: dict[str, Any] = _width_and_height(size)
        tempered = {} if temperature is None else {"temperature": _temperature(temperature)}
        schedule = {key: value for key, value in (("h", _h(h)), ("shift", shift)) if value is not None}
        if subfolder is not None and adapter is None:
            raise UsageError("--subfolder is one of the adapter's: give --adapter too.")
        if prompt and labels:
            raise UsageError("give --prompt or --class, by what the model takes, not both.")
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file: give a folder.")
        stack.enter_context(_spoken_warnings())

        bars = stack.enter_context(progress())
        task = bars.add_task(f"loading {model}", total=None)
        import torch

        from piflow.commands.pictures import PictureFolder
        from piflow.commands.sources import DIGITS, DIGITS_TEACHER, open_model

        stack.enter_context(quiet_libraries())
        place = usable_device(device)
        small = place == "cpu" or model in (DIGITS, DIGITS_TEACHER)
        kind = getattr(torch, dtype or ("float32" if small else "bfloat16"))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = open_model(model, scratch, adapter=adapter, subfolder=subfolder, vae=vae, dtype=kind)
        subjects = _subjects(opened, model, prompt, labels)
        call |= _settings(opened, nfe, substeps, tempered, guidance, negative_prompt, schedule)
        _check_size(opened, model, call)
        pipe = _placed(opened.pipe, place, offload)

        asked = _pairs(subjects, seeds, rows_are_seeds=opened.is_class_conditional)
        bars.update(task, description="sampling", total=len(asked) * call["num_inference_steps"])
        common = {
            "piflow": piflow.__version__,
            "model": model,
            "adapter": "/".join(filter(None, (adapter, subfolder))) or None,
            "nfe": call["num_inference_steps"],
            **{key: value for key, value in call.items() if key not in ("num_inference_steps", "width", "height")},
            "schedule": opened.training.schedule | schedule,
            "dtype": str(kind).removeprefix("torch."),
            "device": place,
        }
        argument = "class_labels" if opened.is_class_conditional else "prompt"
        pictures = PictureFolder(out)
        for subject, number in asked:
            generator = torch.Generator().manual_seed(number)
            try:
                call[argument] = subject
                result = pipe(generator=generator, callback_on_step_end=_advancing(bars, task), **call)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"the memory of {place} is too small: --offload needs less, so do a smaller --size and --dtype."
                ) from error
            pictures.add(result.images[0], {argument.removesuffix("_labels"): subject, "seed": number, **common})
        grid = pictures.write_grid(len(subjects) if opened.is_class_conditional else len(seeds))
    if as_json:
        seconds = round(time.perf_counter() - started, 2)
        found = {"images": pictures.made, "grid": grid and str(grid), "seconds": seconds}
        typer.echo(json.dumps(found))
        return
    typer.echo(grid or pictures.made[0]["file"])


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    """What the pipelines warn of is one line; what libraries warn each other of is not for the person."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("once", message="num_inference_steps")
        warnings.showwarning = lambda message, *_: print(f"piflow: {message}", file=sys.stderr)
        yield


def _subjects(opened: Model, name: str, prompts: list[str] | None, labels: list[int] | None) -> list[Any]:
    """What is to be seen: prompts, or class labels."""
    if not opened.is_class_conditional:
        if labels is not None:
            raise UsageError(f"--class: {name} takes a --prompt.")
        if not prompts:
            raise UsageError(f"--prompt is missing: {name} makes pictures of what it says.")
        return prompts
    if prompts:
        raise UsageError(f"--prompt: {name} takes a --class, a number.")
    number_of_classes = opened.pipe.transformer.config.num_embeds_ada_norm
    if labels is None and number_of_classes > 10:
        raise UsageError(f"--class is missing: {name} knows 0 to {number_of_classes - 1}.")
    labels = list(range(number_of_classes)) if labels is None else labels
    if wrong := [label for label in labels if label >= number_of_classes]:
        raise UsageError(f"--class: {name} knows 0 to {number_of_classes - 1}, got {wrong[0]}.")
    return labels


def _check_size(opened: Model, name: str, call: dict[str, Any]) -> None:
    """The base model's own pipeline would round it."""
    given = [call[side] for side in ("width", "height") if side in call]
    if given and opened.is_class_conditional:
        raise UsageError(f"--size: {name} makes pictures of one size.")
    multiple = 1 if opened.is_class_conditional else 2 * opened.pipe.vae_scale_factor
    if wrong := [side for side in given if side % multiple or not side]:
        below = max(wrong[0] // multiple, 1) * multiple
        raise UsageError(
            f"--size: expected multiples of {multiple}, got {wrong[0]}; next to it are {below} and {below + multiple}"
        )


def _settings(
    opened: Model,
    nfe: int | None,
    substeps: int | None,
    temperature: dict[str, float | str | None],
    guidance: float | None,
    negative_prompt: str | None,
    schedule: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of each call; the steps of the `schedule`, the training's where it does not say, go to the pipeline."""
    import inspect

    from piflow.pipelines.denoise import DEFAULT_NFE
    from piflow.pipelines.stand_ins import is_student
    from piflow.schedulers import FlowMapSDEScheduler

    pipe, training = opened.pipe, opened.training
    arguments = inspect.signature(pipe.__call__).parameters
    student = is_student(pipe.transformer)
    steps = DEFAULT_NFE if student else arguments["num_inference_steps"].default or 50
    call: dict[str, Any] = {"num_inference_steps": nfe or training.nfe or steps}
    if student:
        call |= {"total_substeps": substeps or training.total_substeps or 128}
        call |= temperature or {"temperature": arguments["temperature"].default}
    elif substeps or "h" in schedule or temperature:
        raise UsageError(
            "--substeps, --temperature and --h are a student's: this is a base model, which takes Euler steps."
        )
    given = training.schedule | schedule
    if given:
        known = dict(pipe.scheduler.config) if isinstance(pipe.scheduler, FlowMapSDEScheduler) else {}
        if "shift" in schedule:
            given["use_dynamic_shifting"] = False
        pipe.scheduler = FlowMapSDEScheduler.from_config({**(known or pipe.student_schedule), **given})
    guidance = opened.guidance if guidance is None else guidance
    classifier_free = "true_cfg_scale" in arguments and not _embeds_guidance(pipe)
    if guidance is not None:
        call["true_cfg_scale" if classifier_free else "guidance_scale"] = guidance
    if negative_prompt is not None:
        if not classifier_free:
            raise UsageError("--negative-prompt: this model takes none.")
        usual = 1.0 if student else math.inf  # a base model's own
        if (usual if guidance is None else guidance) <= 1:
            raise UsageError("--negative-prompt does nothing without guidance: give --guidance, above 1, too.")
        call["negative_prompt"] = negative_prompt
    return call


def _embeds_guidance(pipe: Any) -> bool:
    return bool(pipe.transformer.config.get("guidance_embeds"))


def _placed(pipe: Any, place: str, offload: bool) -> Any:
    pipe.set_progress_bar_config(disable=True)
    if offload:
        if place == "cpu":
            raise UsageError("--offload needs a GPU to offload from.")
        pipe.enable_model_cpu_offload(device=place)
        return pipe
    return pipe.to(place)


def _advancing(bars: Progress, task: TaskID) -> Callable[..., dict[str, Any]]:
    def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bars.advance(task)
        return {}

    return on_step_end


def _pairs(subjects: list[Any], seeds: list[int], rows_are_seeds: bool) -> list[tuple[Any, int]]:
    """In the order of the grid: a row for each seed, or else for each subject."""
    if rows_are_seeds:
        return [(subject, seed) for seed, subject in itertools.product(seeds, subjects)]
    return list(itertools.product(subjects, seeds))


def _temperature(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UsageError(f"--temperature: expected a number from 0 on, auto or none, got {text}")
    return value


def _h(text: str | None) -> float | str | None:
    if text is None or text == "inf":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"--h: expected a number from 0 on, or inf, got {text}")
    return value


def _width_and_height(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    found = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", size)
    if not found:
        raise UsageError(f"--size: expected width x height such as 1664x928, or one number, got {size}")
    width, height = int(found[1]), int(found[2] or found[1])
    if max(width, height) > LONGEST_SIDE:
        raise UsageError(too_large("--size", max(width, height)))
    return {"width": width, "height": height}
