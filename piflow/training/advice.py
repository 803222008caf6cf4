"""What to change in a run that does not fit. Every line was planned with that change: its numbers are the plan's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from piflow.training.config import TrainConfig
from piflow.training.errors import ConfigError

if TYPE_CHECKING:
    from piflow.training.plan import Plan

Values = dict[str, Any]  # {dotted key: value}
Planner = Callable[[TrainConfig, int], "Plan"]  # of a configuration and a number of GPUs
FACTORS = (2, 4, 8, 16, 32)  # more GPUs


def changes(config: TrainConfig, plan: Plan, again: Planner) -> Iterator[str]:
    """Overrides and numbers of GPUs that make a plan smaller: what fits first, then what saves most.

    Where no change is enough by itself, the first line is the shortest run of them that is, the harmless ones first.
    """
    options = [_smallest(list(steps), config, plan, again) for steps in _options(config, plan)]
    tried = [(values, plan.num_gpus, _planned(config, values, plan.num_gpus, again)) for values in options]
    tried.append(_larger(config, plan, again))
    found = [(other.fits, plan.peak - other.peak, _said(values, gpus, plan)) for values, gpus, other in tried if other]
    helps = sorted((one for one in found if one[1] > 0), reverse=True)
    if not any(fits for fits, _, _ in helps) and (together := _together(config, plan, options, again)):
        values, gpus, other = together
        yield f"{_said(values, gpus, plan)}: {(plan.peak - other.peak) / 1e9:.2f} GB less, fits"
    for fits, less, text in helps:
        yield f"{text}: {less / 1e9:.2f} GB less, {'fits' if fits else 'not enough alone'}"


def _options(config: TrainConfig, plan: Plan) -> Iterator[Iterator[Values]]:
    """Changes, the harmless ones first, each as settings of growing effect."""
    zero, lora, largest = config.zero, config.student.lora, plan.counts.largest
    if not config.student.gradient_checkpointing:
        yield iter([{"student.gradient_checkpointing": True}])
    if plan.num_gpus > 1 and zero.param_persistence_threshold > 100_000:
        yield iter([{"zero.param_persistence_threshold": 0}])
    if zero.max_reuse_distance:
        yield iter([{"zero.max_reuse_distance": 0}])
    if zero.max_live_parameters > 2 * largest:
        ahead = min(zero.prefetch_bucket_size, largest)
        yield iter([{"zero.max_live_parameters": 2 * largest, "zero.prefetch_bucket_size": ahead}])
    if zero.reduce_bucket_size > largest:
        yield iter([{"zero.reduce_bucket_size": largest}])
    if config.batch_size_per_rank > 1:
        yield ({"batch_size_per_rank": size} for size in _divisors(config.batch_size_per_rank))
    if config.optimizer.kind == "adamw":
        yield iter([{"optimizer.kind": "adamw_8bit"}])
    if lora and lora.rank > 1:
        yield iter([{"student.lora.rank": lora.rank // 2}])


def _divisors(number: int) -> Iterator[int]:
    """Its divisors below itself, the largest first."""
    return (size for size in range(number // 2, 0, -1) if number % size == 0)


def _smallest(steps: list[Values], config: TrainConfig, plan: Plan, again: Planner) -> Values:
    """The first setting with which the run fits, or else the one of most effect."""
    for values in steps:
        other = _planned(config, values, plan.num_gpus, again)
        if other and other.fits:
            return values
    return steps[-1]


def _larger(config: TrainConfig, plan: Plan, again: Planner) -> tuple[Values, int, Plan | None]:
    """The fewest GPUs with which the run fits, or else the most."""
    best: tuple[Values, int, Plan | None] = ({}, plan.num_gpus, None)
    for factor in FACTORS:
        if other := _planned(config, {}, factor * plan.num_gpus, again):
            best = ({}, factor * plan.num_gpus, other)
            if other.fits:
                break
    return best


def _together(
    config: TrainConfig, plan: Plan, options: list[Values], again: Planner
) -> tuple[Values, int, Plan] | None:
    """The first of the options that fit together, on as few GPUs as it goes, without those that are not needed."""
    for factor in (1, *FACTORS):
        gpus, used = factor * plan.num_gpus, list[Values]()
        for values in options:
            used.append(values)
            other = _planned(config, _merged(used), gpus, again)
            if other and other.fits:
                break
        else:
            continue
        for values in reversed(list(used)):
            rest = [other for other in used if other is not values]
            without = _planned(config, _merged(rest), gpus, again)
            if without and without.fits:
                used, other = rest, without
        return _merged(used), gpus, other
    return None


def _planned(config: TrainConfig, values: Values, gpus: int, again: Planner) -> Plan | None:
    """The plan of a changed run, or None where the rest of the configuration does not allow it."""
    with suppress(ConfigError, ValueError):
        return again(with_values(config, values), gpus)
    return None


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """A configuration with other values at dotted keys."""
    raw = config.model_dump()
    for name, value in values.items():
        *sections, key = name.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[key] = value
    return TrainConfig.model_validate(raw)


def _merged(used: list[Values]) -> Values:
    return {name: value for values in used for name, value in values.items()}


def _said(values: Values, gpus: int, plan: Plan) -> str:
    """`student.lora.rank=128 on 16 GPUs`, as overrides are written."""
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]
    if gpus != plan.num_gpus:
        words += ["on", f"{gpus} GPUs"] if words else [f"{gpus} GPUs"]
    return " ".join(words)
