"""The metrics of one set of samples: which there are, what each needs, and what it warns of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from piflow.evaluation.cache import FeatureCache
from piflow.evaluation.extractors import Extractor
from piflow.evaluation.frechet import Moments, frechet_distance, frechet_from_moments
from piflow.evaluation.inception_score import SPLIT, inception_score
from piflow.evaluation.mmd import kid, mmd_squared
from piflow.evaluation.neighbours import coverage, diversity, precision_recall
from piflow.evaluation.sources import Statistics

SUBSET = 1000  # samples, of KID
COVERAGE_K = 5


class Features:
    """The features of a source, streamed from their shards where a metric allows it."""

    def __init__(self, shards: FeatureCache, device: str = "cpu") -> None:
        self.shards, self.device, self.count = shards, device, shards.count
        self.fields = shards.fields()

    @cached_property
    def width(self) -> int:
        """Number of features D."""
        return next(self.shards.shards("features")).shape[1]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance, streamed."""
        moments = Moments()
        for features in self.shards.shards("features"):
            moments.update(features)
        return moments.compute()

    @cached_property
    def whole(self) -> Tensor:
        """All features (N, D), on the device."""
        return self.shards.whole("features").to(self.device)

    @cached_property
    def groups(self) -> Tensor:
        """Class or prompt (N,) of each sample; one group of all where there are none."""
        groups = self.shards.whole("groups") if "groups" in self.fields else torch.zeros(self.count, dtype=torch.int64)
        return groups.to(self.device)

    @cached_property
    def diversity(self) -> dict[int, float]:
        """Mean distance within each group."""
        return diversity(self.whole, self.groups)

    @property
    def logits(self) -> Iterator[Tensor]:
        """Logits, shard by shard."""
        return self.shards.shards("logits")


def share_groups(samples: Features, teacher: Features) -> None:
    """Rows of one condition are of one class or prompt, also where only one side knows which."""
    for one, other in ((samples, teacher), (teacher, samples)):
        if "groups" in other.fields - one.fields:
            one.groups, one.fields = other.groups, one.fields | {"groups"}


@dataclass
class Measured:
    """What one run is measured by: features of its samples and the teacher's, and endpoint errors (N,)."""

    name: str
    samples: Features
    teacher: Features | None = None
    errors: Tensor | None = None
    reference: Features | None = None
    statistics: Statistics | None = None

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Of the samples against the reference."""
        return precision_recall(self.samples.whole, _there(self.reference).whole)


@dataclass
class Values:
    """Results of one run: numbers, numbers by group, what to know about them, and why others are missing."""

    numbers: dict[str, float] = field(default_factory=dict)
    by_group: dict[str, dict[int, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number, or one for each group of which the mean is taken; `needs` are names in NEEDS."""

    title: str
    better: str
    needs: tuple[str, ...]
    compute: Callable[[Measured], float | dict[int, float]]


def measure(
    run: Measured,
    reference: Features | None,
    statistics: Statistics | None,
    extractor: Extractor,
    metrics: Collection[str] | None = None,
) -> Values:
    """All metrics that the run allows, or those named. Raises ValueError for one that is named and not possible."""
    run.reference, run.statistics = reference, statistics
    names = metric_names(extractor)
    check_names(metrics or (), extractor)
    found = Values()
    for key, metric in METRICS.items():
        name = names[key]
        if metrics is not None and name not in metrics:
            continue
        problem = next((NEEDS[need][1] for need in metric.needs if not NEEDS[need][0](run, extractor)), None)
        if problem is None:
            try:
                value = metric.compute(run)
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            if metrics is not None:
                raise ValueError(f"{run.name}: {name} cannot be measured: {problem}")
            found.left_out[name] = problem
            continue
        if isinstance(value, dict):
            found.by_group[name] = value
            value = sum(value.values()) / len(value)
        found.numbers[name] = value
    found.warnings = _warnings(run, found, names)
    return found


def metric_names(extractor: Extractor) -> dict[str, str]:
    """{name here: name in results}: with Inception's features, three go by the names that they have there."""
    return {key: INCEPTION_NAMES.get(key, key) if extractor.name == "inception" else key for key in METRICS}


def check_names(metrics: Collection[str], extractor: Extractor) -> None:
    """Raise ValueError for a metric that there is not, or not with these features."""
    known = metric_names(extractor).values()
    for name in metrics:
        if name in INCEPTION_NAMES.values() and name not in known:
            raise ValueError(
                f"{name} is a metric of Inception's features (--features inception), not of {extractor.name}."
            )
        if name not in known:
            raise ValueError(f"There is no metric {name!r} with features of {extractor.name}, but {', '.join(known)}.")


def check_needs(metrics: Collection[str], extractor: Extractor, given: Mapping[str, bool]) -> None:
    """Raise ValueError for a metric that needs what is not `given` ({name in NEEDS: whether it is there})."""
    for key, name in metric_names(extractor).items():
        missing = [need for need in METRICS[key].needs if not given.get(need, True)]
        if name in metrics and missing:
            raise ValueError(f"{name} cannot be measured: {NEEDS[missing[0]][1]}")


def _warnings(run: Measured, found: Values, names: dict[str, str]) -> list[str]:
    width, warnings = run.samples.width, []
    for key, other in (("frechet", run.reference), ("frechet_to_teacher", run.teacher)):
        fewest = min(run.samples.count, other.count if other else run.samples.count)
        if names[key] in found.numbers and fewest <= width:
            warnings.append(
                f"{names[key]}: {fewest} samples are too few for {width} features. The covariance is singular and the "
                f"distance biased; compare only sets of equal size, or take many more than {width}."
            )
    for key, other in (("mmd_polynomial", run.reference), ("mmd_polynomial_to_teacher", run.teacher)):
        if names[key] in found.numbers and other and min(run.samples.count, other.count) <= SUBSET:
            warnings.append(f"{names[key]}: one estimate from all samples, since there are no more than {SUBSET}.")
    if names["classifier_score"] in found.numbers and run.samples.count % SPLIT:
        warnings.append(
            f"{names['classifier_score']}: the last split has {run.samples.count % SPLIT} samples and not {SPLIT}; "
            "small splits score lower."
        )
    return warnings


def _frechet(run: Measured) -> float:
    if run.statistics is not None:
        width = run.samples.width
        if len(run.statistics.mean) != width:
            raise ValueError(f"the reference's mu has {len(run.statistics.mean)} features, the samples have {width}.")
        return frechet_from_moments(*run.samples.moments, run.statistics.mean, run.statistics.covariance)
    return _frechet_between(run.samples, _there(run.reference))


def _frechet_between(a: Features, b: Features) -> float:
    if max(a.count, b.count) <= a.width:  # then the features are smaller than their covariances
        return frechet_distance(a.whole, b.whole)
    return frechet_from_moments(*a.moments, *b.moments)


def _coverage(run: Measured) -> dict[int, float]:
    samples, teacher, found = run.samples, _there(run.teacher), {}
    for group in teacher.groups.unique().tolist():
        members = teacher.groups == group  # the samples have the same: they are paired
        theirs, ours = teacher.whole[members], samples.whole[members]
        if len(theirs) > COVERAGE_K:
            found[group] = coverage(ours, theirs, COVERAGE_K, paired=True)
    if not found:
        raise ValueError(f"no class or prompt has more than {COVERAGE_K} samples of the teacher.")
    return found


def _diversity(features: Features) -> dict[int, float]:
    if not features.diversity:
        raise ValueError("no class or prompt has two samples.")
    return features.diversity


def _diversity_ratio(run: Measured) -> dict[int, float]:
    ours, theirs = _diversity(run.samples), _diversity(_there(run.teacher))
    ratios = {group: ours[group] / theirs[group] for group in ours if theirs.get(group)}
    if not ratios:
        raise ValueError("in no class or prompt do the teacher's samples differ.")
    return ratios


def _accuracy(run: Measured) -> float:
    predicted = torch.cat([logits.argmax(dim=1) for logits in run.samples.logits]).to(run.samples.device)
    return (predicted == run.samples.groups).double().mean().item()


def _there(features: Features | None) -> Features:
    assert features is not None  # NEEDS has been asked
    return features


NEEDS: dict[str, tuple[Callable[[Measured, Extractor], bool], str]] = {
    "reference": (lambda run, _: run.reference is not None, "there is no reference with images."),
    "distribution": (lambda run, _: bool(run.reference or run.statistics), "there is no reference."),
    "teacher": (lambda run, _: run.teacher is not None, "there is no teacher."),
    "logits": (lambda run, _: "logits" in run.samples.fields, "these features come without class logits."),
    "clip": (lambda run, _: "clip" in run.samples.fields, "there is no CLIP model, or there are no prompts."),
    "classes": (
        lambda run, extractor: extractor.classes and "groups" in run.samples.fields,
        "the features' classifier knows other classes than the samples, or these have none.",
    ),
}
INCEPTION_NAMES = {"frechet": "fid", "mmd_polynomial": "kid", "classifier_score": "inception_score"}
LOWER, HIGHER, NEARER_ONE, NEITHER = "lower", "higher", "nearer to 1", ""
METRICS: dict[str, Metric] = {
    "frechet": Metric("Fréchet distance to the reference", LOWER, ("distribution",), _frechet),
    "mmd_polynomial": Metric(
        f"MMD², unbiased, kernel (x·y/D + 1)³, mean of 100 subsets of {SUBSET}, to the reference", LOWER,
        ("reference",), lambda run: kid(run.samples.whole, _there(run.reference).whole, subset_size=SUBSET)[0],
    ),
    "mmd_rbf": Metric(
        "MMD², unbiased, RBF kernel of the reference's RMS distance, to the reference", LOWER,
        ("reference",), lambda run: mmd_squared(run.samples.whole, _there(run.reference).whole, "rbf"),
    ),
    "precision": Metric(
        "share of samples in the reference's manifold (k = 3)", HIGHER, ("reference",),
        lambda run: run.precision_recall[0],
    ),
    "recall": Metric(
        "share of the reference in the samples' manifold (k = 3)", HIGHER, ("reference",),
        lambda run: run.precision_recall[1],
    ),
    "classifier_score": Metric(
        f"exp(mean KL(p(y|x) || p(y))), splits of {SPLIT}", HIGHER, ("logits",),
        lambda run: inception_score(run.samples.logits)[0],
    ),
    "class_accuracy": Metric(
        "share of samples that the classifier puts in their class", HIGHER, ("classes",), _accuracy
    ),
    "clip_score": Metric(
        "mean 100 max(cos, 0) of image and prompt", HIGHER, ("clip",),
        lambda run: run.samples.shards.whole("clip").mean().item(),
    ),
    "endpoint_mse": Metric(
        "mean squared difference from the teacher's endpoint of the same noise", LOWER, ("teacher",),
        lambda run: torch.as_tensor(run.errors).mean().item(),
    ),
    "frechet_to_teacher": Metric(
        "Fréchet distance to the teacher's samples", LOWER, ("teacher",),
        lambda run: _frechet_between(run.samples, _there(run.teacher)),
    ),
    "mmd_polynomial_to_teacher": Metric(
        f"MMD², unbiased, kernel (x·y/D + 1)³, mean of 100 subsets of {SUBSET}, to the teacher", LOWER,
        ("teacher",), lambda run: kid(run.samples.whole, _there(run.teacher).whole, subset_size=SUBSET, paired=True)[0],
    ),
    "mmd_rbf_to_teacher": Metric(
        "MMD², unbiased, RBF kernel of the teacher's RMS distance, to the teacher", LOWER,
        ("teacher",), lambda run: mmd_squared(run.samples.whole, _there(run.teacher).whole, "rbf", paired=True),
    ),
    "diversity": Metric(
        "mean distance of two samples of a class or prompt, in features", NEITHER, (),
        lambda run: _diversity(run.samples),
    ),
    "diversity_of_teacher": Metric(
        "the same of the teacher's samples", NEITHER, ("teacher",), lambda run: _diversity(_there(run.teacher))
    ),
    "diversity_ratio": Metric(
        "diversity over the teacher's, class by class", NEARER_ONE, ("teacher",), _diversity_ratio
    ),
    "coverage_of_teacher": Metric(
        f"share of the teacher's samples with another noise's sample of their class in their ball (k = {COVERAGE_K})",
        HIGHER, ("teacher",), _coverage,
    ),
}  # fmt: skip
