"""The operators of this machine against the textbook in float64: a few seconds, on every device. Needs torch alone.

The whole of the choice is under test: the backend that a call without `backend=` gets, forward and gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import piflow_kernels

GM_LEAVES = ("means", "logstds", "logweights", "x_src")
DX_LEAVES = ("grid", "x_src")
OPERATORS = ("velocity", "rollout", "mean_velocity", "mean_velocity_loss")
NETWORK = ("means", "logweights", "grid")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Of the largest difference by the largest value. The gradients of a bfloat16 network output are rounded to it."""


def self_test(devices: list[torch.device], on_case: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """{"passed", "seconds", "cases": [...]}: each case one operator, network dtype and device, with its `error`.

    An operator that raises has failed, and its case says with what.
    """
    started, cases = time.perf_counter(), []
    for case in _cases(devices):
        cases.append(case)
        if on_case is not None:
            on_case(case)
    return {
        "passed": all(case["passed"] for case in cases),
        "seconds": round(time.perf_counter() - started, 2),
        "cases": cases,
    }


def number_of_cases(devices: list[torch.device]) -> int:
    return 2 * len(OPERATORS) * len(TOLERANCES) * len(devices)


def _cases(devices: list[torch.device]) -> Iterator[dict[str, Any]]:
    for dtype, tolerance in TOLERANCES.items():
        for policy, leaves in (("gm", GM_LEAVES), ("dx", DX_LEAVES)):
            problem = _problem(policy, dtype)
            for operator in OPERATORS:
                arguments = _arguments_of(operator, problem)
                start = "x_t" if operator == "velocity" else "x_start"
                names = (start, *leaves, *(("target",) if operator.endswith("loss") else ()))
                double = {key: value.double() for key, value in arguments.items()}
                expected = _values(f"{policy}_{operator}", double, names, backend="reference")
                for device in devices:
                    case = {"operator": f"{policy}_{operator}", "device": str(device), "network": str(dtype)[6:]}
                    try:
                        there = {key: value.to(device) for key, value in arguments.items()}
                        error = _error(_values(f"{policy}_{operator}", there, names), expected)
                    except Exception as problem_there:  # a compiler or driver says what it likes
                        lines = str(problem_there).strip().splitlines() or [""]
                        yield {**case, "passed": False, "raised": f"{type(problem_there).__name__}: {lines[0]}"[:300]}
                        continue
                    yield {**case, "passed": error <= tolerance, "error": error, "tolerance": tolerance}


def _problem(policy: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two samples of an 8-component policy over 16 x 16 pixels of 4 channels, at different source levels.

    The rollouts end where the textbook in float32 is still within 1e-5: nearer to sigma 0 the choice of a component
    hangs on the last bits of its logit, and every formula differs from every other.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, k, c, size = 2, 8, 4, (16, 16)
    sigma_src = torch.tensor([1.0, 0.7])
    levels = torch.stack([torch.linspace(1, 0.4, 17), torch.linspace(0.65, 0.3, 17)])
    x_src = draw(batch, c, *size)
    problem = {
        "x_start": x_src + 0.1 * draw(batch, c, *size), "sigmas": levels, "x_src": x_src, "sigma_src": sigma_src,
        "target": draw(batch, c, *size),
    }  # fmt: skip
    network = draw(batch, k, c, *size)
    if policy == "gm":
        problem |= {"means": network, "logstds": torch.tensor([-1.0, -2.0]), "logweights": draw(batch, k, 1, *size)}
    else:
        problem |= {"grid": network, "segment_size": torch.tensor([0.8, 0.5]), "shift": torch.tensor([3.2, 3.2])}
    return {key: value.to(dtype) if key in NETWORK else value for key, value in problem.items()}


def _arguments_of(operator: str, problem: dict[str, Tensor]) -> dict[str, Tensor]:
    arguments = {key: value for key, value in problem.items() if key != "target" or operator.endswith("loss")}
    if operator == "velocity":
        arguments["x_t"], arguments["sigma_t"] = arguments.pop("x_start"), arguments.pop("sigmas")[:, 0]
    return arguments


def _values(operator: str, arguments: dict[str, Tensor], names: tuple[str, ...], **options: Any) -> list[Tensor]:
    """The result and its gradients by `names`, for one cotangent."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    result = getattr(piflow_kernels, operator)(**{**arguments, **leaves}, **options)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return [result.detach(), *torch.autograd.grad((result * cotangent).sum(), list(leaves.values()))]


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any value or gradient by its largest value; infinite where a number is not finite."""
    errors = [(a.cpu().double() - e).abs().max() / e.abs().max() for a, e in zip(actual, expected, strict=True)]
    worst = torch.stack(errors).max()
    return worst.item() if worst.isfinite() else float("inf")
