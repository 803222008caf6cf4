"""One evaluation: features of every run and what it is compared with, then the metrics that these allow.

    report = evaluate([Run(samples, teacher)], extractor, cache, reference=reference)

A run is one set of samples: of one seed of a model, or one folder or file. Means and intervals go over runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import piflow
from piflow.evaluation.cache import FeatureCache
from piflow.evaluation.endpoint import endpoint_errors
from piflow.evaluation.extractors import Clip, Extractor, as_floats
from piflow.evaluation.measure import Features, Measured, check_names, check_needs, measure, share_groups
from piflow.evaluation.report import Report, summarised
from piflow.evaluation.sources import Batch, Source, Statistics, check_images

Progress = Callable[[str, int, int], None]
"""(what, done, of how many)."""


@dataclass(frozen=True)
class Run:
    """One set of samples, and the teacher's from the same noises and conditions, row by row.

    prompts: of sources that do not know theirs, taken in turn.
    """

    samples: Source
    teacher: Source | None = None
    prompts: Sequence[str] | None = None


@dataclass(frozen=True)
class Options:
    """How samples are read: results are bitwise repeatable for the same options, machine and number of threads."""

    batch_size: int = 64
    shard_size: int = 1024
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def evaluate(
    runs: Sequence[Run],
    extractor: Extractor,
    cache: Path | str,
    *,
    reference: Source | None = None,
    statistics: Statistics | None = None,
    clip: Clip | None = None,
    metrics: Collection[str] | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure samples against a reference and a teacher.

    Args:
        runs: one for each seed; two or more give confidence intervals.
        cache: folder for features. What is in it is used where its settings are the same.
        reference: what Fréchet distance, MMD, precision and recall compare with; the same for all runs.
        statistics: for the Fréchet distance, instead of those of `reference`.
        clip: what scores images under their prompts.
        metrics: their names; by default all that are possible. Those asked for must be possible.
        progress: called with ("samples, seed 0", done, of how many) as samples are read.

    Raises ValueError or OSError that says what is missing, does not fit, or is broken.
    """
    options = options or Options()
    if not runs:
        raise ValueError("runs: expected at least one set of samples, got none.")
    cache = Path(cache)
    _check(runs, extractor, reference, statistics, clip, metrics or ())
    against = None
    if reference is not None:
        shards = {"reference": _shards(cache, reference, extractor, options)}
        _fill({"reference": reference}, shards, extractor, None, None, None, options, progress)
        against = Features(shards["reference"], options.device)
    measured = [
        measure(_gather(run, extractor, clip, cache, options, progress), against, statistics, extractor, metrics)
        for run in runs
    ]
    return summarised(measured, _settings(runs, reference, statistics, extractor, clip, options))


def _check(
    runs: Sequence[Run],
    extractor: Extractor,
    reference: Source | None,
    statistics: Statistics | None,
    clip: Clip | None,
    metrics: Collection[str],
) -> None:
    """Raise ValueError for what can be known before hours of sampling."""
    check_names(metrics, extractor)
    check_needs(
        metrics,
        extractor,
        {
            "reference": reference is not None,
            "distribution": reference is not None or statistics is not None,
            "teacher": all(run.teacher is not None for run in runs),
            "clip": clip is not None and all(_has_prompts(run) for run in runs),
        },
    )
    known: set[str] = set()
    for run in runs:
        if run.teacher is not None and run.teacher.count != run.samples.count:
            raise ValueError(
                f"{run.teacher.name} has {run.teacher.count} images, {run.samples.name} has {run.samples.count}: "
                "a teacher's come from the same noises, row by row."
            )
        known.add(json.dumps(run.samples.settings, sort_keys=True))
    if len(known) < len(runs):
        raise ValueError(
            f"{len(runs)} runs have {len(known)} different sets of samples: an interval needs independent ones."
        )


def _has_prompts(run: Run) -> bool:
    return run.prompts is not None or bool(getattr(run.samples, "texts", False))


def _gather(
    run: Run, extractor: Extractor, clip: Clip | None, cache: Path, options: Options, progress: Progress | None
) -> Measured:
    """Features of a run's samples and of its teacher's, from the cache or made now."""
    sources = {"samples": run.samples}
    if run.teacher is not None:
        sources["teacher"] = run.teacher
    scored = clip if _has_prompts(run) else None
    shards = {"samples": _shards(cache, run.samples, extractor, options, scored, run.prompts)}
    if run.teacher is not None:
        shards["teacher"] = _shards(cache, run.teacher, extractor, options)
    pairs = None
    if "teacher" in shards:
        pair_settings = {"pair": [shards["samples"].hash, shards["teacher"].hash]}
        pairs = FeatureCache(cache, pair_settings, run.samples.count, options.shard_size)
    _fill(sources, shards, extractor, scored, pairs, run.prompts, options, progress)
    samples = Features(shards["samples"], options.device)
    if pairs is None:
        return Measured(run.samples.name, samples)
    teacher = Features(shards["teacher"], options.device)
    share_groups(samples, teacher)
    return Measured(run.samples.name, samples, teacher, pairs.whole("errors"))


def _fill(
    sources: dict[str, Source],
    shards: dict[str, FeatureCache],
    extractor: Extractor,
    clip: Clip | None,
    pairs: FeatureCache | None,
    prompts: Sequence[str] | None,
    options: Options,
    progress: Progress | None,
) -> None:
    """Write the shards that are missing. Samples and teacher go side by side, so that no image is kept."""
    count, title = sources[next(iter(sources))].count, next(iter(sources.values())).name
    for number in range(shards[next(iter(shards))].num_shards):
        due = {name for name in sources if not shards[name].is_finished(number)}
        pair_due = pairs is not None and not pairs.is_finished(number)
        needed = set(sources) if pair_due else due
        rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in needed}
        errors: list[Tensor] = []
        items = next(iter(shards.values())).items(number)
        for start in range(items.start, items.stop, options.batch_size) if needed else ():
            stop = min(start + options.batch_size, items.stop)
            batches = {name: _checked(sources[name], start, stop) for name in needed}
            for name in due:
                extra = (clip, prompts) if name == "samples" else (None, None)
                try:
                    row = _row(batches[name], extractor, *extra, start)
                except ValueError as error:
                    raise ValueError(f"{sources[name].name}: {error}") from error
                for field, value in row.items():
                    rows[name].setdefault(field, []).append(value)
            if pair_due:
                errors.append(_errors(batches["samples"], batches["teacher"], sources))
            if progress is not None:
                progress(title, stop, count)
        for name in due:
            shards[name].write(number, {field: torch.cat(values) for field, values in rows[name].items()})
        if pairs is not None and pair_due:
            pairs.write(number, {"errors": torch.cat(errors)})
        if progress is not None:
            progress(title, items.stop, count)


def _checked(source: Source, start: int, stop: int) -> Batch:
    batch = source.batch(start, stop)
    check_images(source.name, start, batch.images)
    return batch


def _row(
    batch: Batch, extractor: Extractor, clip: Clip | None, prompts: Sequence[str] | None, start: int
) -> dict[str, Tensor]:
    row, groups, texts = extractor(batch.images), batch.groups, batch.prompts
    if prompts:
        places = [place % len(prompts) for place in range(start, start + len(batch.images))]
        groups = torch.tensor(places) if groups is None else groups
        texts = texts or [prompts[place] for place in places]
    if groups is not None:
        row["groups"] = groups.long().contiguous()
    if clip is not None:
        row["clip"] = clip.scores(batch.images, texts or ())
    return row


def _errors(samples: Batch, teacher: Batch, sources: dict[str, Source]) -> Tensor:
    """Of latents where both have them, else of images: of pictures where one side has no more than these."""
    a, b = samples.latents, teacher.latents
    if a is None or b is None:
        whole = a is None and b is None
        a, b = (images if whole else images.clamp(-1, 1) for images in map(as_floats, (samples.images, teacher.images)))
    if samples.groups is not None and teacher.groups is not None and not torch.equal(samples.groups, teacher.groups):
        raise ValueError(f"{sources['samples'].name} and {sources['teacher'].name} differ in their classes or prompts.")
    try:
        return endpoint_errors(a, b)
    except ValueError as error:
        raise ValueError(f"{sources['samples'].name} beside {sources['teacher'].name}: {error}") from error


def _shards(
    cache: Path,
    source: Source,
    extractor: Extractor,
    options: Options,
    clip: Clip | None = None,
    prompts: Sequence[str] | None = None,
) -> FeatureCache:
    settings = {
        "source": source.settings,
        "features": {"name": extractor.name, **extractor.settings},
        "prompts": None if prompts is None else list(prompts),
        "clip": None if clip is None else clip.settings,
        **_machine(options),
    }
    return FeatureCache(cache, settings, source.count, options.shard_size)


def _machine(options: Options) -> dict[str, Any]:
    """What decides how numbers are rounded."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name(options.device) if "cuda" in options.device else options.device,
        "threads": torch.get_num_threads(),
        "versions": {"piflow": piflow.__version__, **versions},
    }


def _settings(
    runs: Sequence[Run],
    reference: Source | None,
    statistics: Statistics | None,
    extractor: Extractor,
    clip: Clip | None,
    options: Options,
) -> dict[str, Any]:
    """What the report says of how it was made: nothing that would differ between two runs of the same."""
    teachers = [run.teacher.name for run in runs if run.teacher is not None]
    return {
        "samples": [run.samples.name for run in runs],
        "num_samples": [run.samples.count for run in runs],
        "teacher": teachers or None,
        "reference": None if reference is None else {"name": reference.name, "num_samples": reference.count},
        "statistics": None if statistics is None else f"mu and sigma of the reference, {len(statistics.mean)} features",
        "features": {"name": extractor.name, **extractor.settings},
        "clip": None if clip is None else clip.settings,
        **_machine(options),
    }
