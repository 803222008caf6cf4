"""Measures the operations of a case: correctness first, then peak memory, then time in turns; one row for each.

A row says what was measured, of what, and how it went ("status"): "ok", "wrong" (not timed), "out of memory",
"unsupported" or "died". Only rows that are ok have times.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import Graphed
from benchmarks.correctness import judge
from benchmarks.memory import is_out_of_memory, keep_freed_memory, peak_bytes
from benchmarks.operations import REFERENCE, Builder, Case, Operation
from benchmarks.roofline import Work
from benchmarks.timing import Stages, in_turns, milliseconds, rounds_within, stage_seconds

Row = dict[str, Any]

EXACT_ELEMENTS = 1 << 23
"""Elements of network output up to which samples are computed in float64; at least one sample always is."""
PROBE_BATCH = 8
"""Samples from which the time of the whole batch is estimated."""


RECORDED = "forward, recorded"
"""A forward pass that keeps what its backward pass needs."""
PASSES = ("forward", RECORDED, "backward", "both")


@dataclass(frozen=True)
class Settings:
    """seconds: for timing one candidate. longest: seconds that the textbook's first call, in fresh memory, may take."""

    device: str = "cpu"
    seconds: float = 1.0
    longest: float = 7.0
    least_rounds: int = 3


Cotangent = Callable[[Tensor], Tensor]


def stages_of(operation: Operation, candidate: str, cotangent: Cotangent | None = None) -> Stages:
    """Forward without gradients, or forward and backward."""
    run, problem, leaves = operation.candidates[candidate], operation.problem, operation.leaves
    if not leaves:

        def forward_only(_: None) -> Tensor:
            with torch.no_grad():
                return run(**problem)

        return [forward_only]
    inputs = [problem[name].detach().clone().requires_grad_() for name in leaves]
    like = cotangent or cotangent_of(operation)

    def forward(_: None) -> Tensor:
        return run(**{**problem, **dict(zip(leaves, inputs))})

    def backward(result: Tensor) -> list[Tensor]:
        return [result.detach(), *torch.autograd.grad(result, inputs, like(result))]

    return [forward, backward]


def cotangent_of(operation: Operation, index: Tensor | None = None) -> Cotangent:
    """Drawn once, from the shape of the result; some samples get what they have in the batch."""
    drawn: list[Tensor] = []

    def cotangent(result: Tensor) -> Tensor:
        if not drawn:
            g = torch.Generator().manual_seed(1)
            whole = torch.randn(operation.batch, *result.shape[1:], generator=g)
            drawn.append((whole if index is None else whole[index]).to(result.device))
        return drawn[0].to(result.dtype)

    return cotangent


def results_of(stages: Stages) -> list[Tensor]:
    value: Any = None
    for stage in stages:
        value = stage(value)
    return value if isinstance(value, list) else [value]


def checked_samples(operation: Operation) -> Tensor:
    """Those whose results are compared, the first and the last among them where there are two: (count,)."""
    per_sample = max(v[0].numel() for v in operation.problem.values() if isinstance(v, Tensor))
    count = min(max(EXACT_ELEMENTS // per_sample, 1), operation.batch)
    return torch.linspace(0, operation.batch - 1, count, dtype=torch.float64).round().long()


def exact_and_textbook(operation: Operation, index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients of some samples, in float64 and in float32, of the textbook."""
    single = operation.samples(index)
    double = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in single.items()}
    cotangent = cotangent_of(operation, index)

    def of(problem: dict[str, Any]) -> list[Tensor]:
        return results_of(stages_of(replace(operation, problem=problem), REFERENCE, cotangent))

    return of(double), of(single)


def batch_within(build: Builder, batch: int, settings: Settings) -> tuple[int, str]:
    """The batch to run, at most `settings.longest` seconds of the textbook's first call, and what to say of it."""
    if batch <= PROBE_BATCH:
        return batch, ""
    stages = stages_of(build(PROBE_BATCH), REFERENCE)
    stage_seconds(stages, settings.device)
    whole = sum(stage_seconds(stages, settings.device)) * batch / PROBE_BATCH
    cut, seconds = batch, whole
    while seconds > settings.longest and cut > PROBE_BATCH:
        cut, seconds = cut // 2, seconds / 2
    if cut == batch:
        return batch, ""
    return cut, f"{cut} of {batch} samples: the textbook's first call of all would take about {whole:.0f} s"


@dataclass(frozen=True)
class Checked:
    """An operation whose candidates have run: a row for each, and the stages of those that are right."""

    operation: Operation
    rows: dict[str, Row]
    stages: dict[str, Stages]


Doing = Callable[..., None]
"""doing(key): which candidate is about to be tried, or "" when none is; whoever kills the process is known.

doing(key, row): what became of one after which the process cannot go on.
"""


def measure_case(case: Case, settings: Settings, skip: dict[str, Row], doing: Doing) -> list[Row]:
    """Rows of all operations of a case. skip: candidates not to be tried, and what their rows say of it.

    Memory is measured before anything is timed: afterwards the process keeps what is freed.
    """
    checked = [check(case, build, settings, skip, doing) for build in case.builders]
    keep_freed_memory()
    return [row for each in checked for row in timed_rows(case, each, settings, doing)]


def check(case: Case, build: Builder, settings: Settings, skip: dict[str, Row], doing: Doing) -> Checked:
    """Correctness and peak memory of every candidate."""
    batch, note = batch_within(build, case.batch, settings)
    operation = build(batch)
    index = checked_samples(operation)
    exact, textbook = exact_and_textbook(operation, index)
    names = ["value", *operation.leaves]
    rows: dict[str, Row] = {}
    stages: dict[str, Stages] = {}
    for candidate, run in operation.candidates.items():
        row = rows[candidate] = {"candidate": candidate, "note": note}
        if (key := key_of(operation, candidate)) in skip:
            row |= skip[key]
            continue
        doing(key)
        try:
            calls = stages_of(operation, candidate)
            first: list[Tensor] = []
            start = time.perf_counter()
            captured = first_call(calls, first, settings.device if isinstance(run, Graphed) else None)
            row["first_call_seconds"] = time.perf_counter() - start
            verdict = judge(names, [each[index.to(each.device)] for each in first], exact, textbook, operation.n_steps)
            first.clear()
            result, error, bound = verdict.worst
            row |= {"result": result, "error": error, "bound": bound, "samples_checked": len(index)}
            row["status"] = "ok" if verdict.right else "wrong"
            if verdict.right:
                row["peak_bytes"] = captured or peak_bytes(partial(results_of, calls), settings.device)
                if operation.leaves and not captured:
                    row["forward_peak_bytes"] = peak_bytes(partial(calls[0], None), settings.device)
                stages[candidate] = calls
        except Exception as error:  # of a candidate: whatever goes wrong there is its result
            row |= failure(error)
            if isinstance(run, Graphed):  # the allocator may be left in the capture
                doing(key, {name: row[name] for name in ("status", "note")})
                raise
        free(settings.device)
    doing("")
    return Checked(operation, rows, stages)


def first_call(calls: Stages, results: list[Tensor], device: str | None) -> int | None:
    """Fills `results`. With a device, the peak memory: of a CUDA graph only the capture allocates."""
    if device is None:
        results.extend(results_of(calls))
        return None
    return peak_bytes(lambda: results.extend(results_of(calls)), device)


def key_of(operation: Operation, candidate: str) -> str:
    return f"{candidate} of {operation.name}" + (" with gradients" if operation.leaves else "")


def free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def failure(error: Exception) -> Row:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return {"status": "out of memory" if is_out_of_memory(error) else "unsupported", "note": reason[:200]}


def timed_rows(case: Case, checked: Checked, settings: Settings, doing: Doing) -> list[Row]:
    """Rows with the times of each candidate, which take turns."""
    rounds, running = {}, {}
    for candidate, calls in checked.stages.items():
        doing(key_of(checked.operation, candidate))
        try:
            stage_seconds(calls, settings.device)
            once = sum(stage_seconds(calls, settings.device))
        except Exception as error:  # out of memory, now that freed memory is kept
            checked.rows[candidate] |= failure(error)
            continue
        rounds[candidate] = rounds_within(settings.seconds, once, settings.least_rounds)
        running[candidate] = calls
    doing("")
    times = in_turns(running, rounds, settings.device)
    rows = [
        row
        for candidate, common in checked.rows.items()
        for row in rows_of_passes(case, checked.operation, common, times.get(candidate, []), settings)
    ]
    return sorted(rows, key=lambda row: PASSES.index(row["pass"]))  # candidates of a pass together


def rows_of_passes(
    case: Case, operation: Operation, row: Row, calls: list[list[float]], settings: Settings
) -> list[Row]:
    """A candidate's rows, one for each pass of the operation."""
    network = next(operation.problem[name] for name in ("means", "grid") if name in operation.problem)
    common: Row = {
        "suite": case.suite, "case": case.name, "operation": operation.name, "device": settings.device,
        "dtype": str(network.dtype).removeprefix("torch."), "batch": operation.batch, "batch_of_model": case.batch,
        "substeps": operation.n_steps, "network_output": list(network.shape),
    }  # fmt: skip
    forward, backward = operation.forward or Work(), operation.backward or Work()
    passes: dict[str, tuple[Work, Callable[[list[float]], float]]] = {"forward": (forward, lambda call: call[0])}
    if operation.leaves:
        passes = {
            RECORDED: (forward, lambda call: call[0]),
            "backward": (backward, lambda call: call[1]),
            "both": (forward + backward, sum),
        }
    row, forward_peak = dict(row), row.get("forward_peak_bytes")
    row.pop("forward_peak_bytes", None)
    rows = []
    for name, (work, seconds) in passes.items():
        known = {} if work == Work() else {"work": asdict(work)}
        times = {"ms": milliseconds([seconds(call) for call in calls]), "rounds": len(calls)} if calls else {}
        rows.append({**common, "pass": name, **row, **known, **times})
        if name == RECORDED and "peak_bytes" in row:
            rows[-1]["peak_bytes"] = forward_peak
    return rows
