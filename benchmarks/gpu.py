"""Everything that wants a GPU, in one command: correctness first, then benchmarks, then the launch table.

    python -m benchmarks.gpu [--out DIR] [--only correctness benchmarks overhead table] [--cases NAME ...] [--force]

Stores correctness.json, benchmarks.json, overhead.json and launch_table.json under OUT/<name of the GPU>/, each with
versions, driver and clocks; benchmarks (all suites of `benchmarks.run`) after each case. Correctness that fails ends
the run before anything is timed. TRITON_DEFAULT_FP_FUSION=0 checks the other setting of floating-point fusion. With
TRITON_INTERPRET=1 and --device cpu, correctness runs on the interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

import piflow_kernels as pk
from benchmarks import run
from benchmarks.correctness import judge
from benchmarks.launch_table import search
from benchmarks.machine import machine
from tests.kernels.problems import (
    DX_LEAVES,
    GM_LEAVES,
    dx_problem,
    gm_problem,
    in_double,
    in_single,
    values_and_gradients,
)

# ---------------------------------------------------------------------------------------------------------------------
# Correctness


def gm_cases(device: str) -> Iterator[tuple[str, str, dict[str, Any], list[str], int, dict[str, Any]]]:
    shapes = [
        (8, 16, (37, 61), 37), (8, 16, (37, 61), 3), (32, 4, (33, 31), 128), (32, 4, (33, 31), 3), (16, 16, (17, 9), 4),
        (8, 64, (9, 31), 5), (8, 128, (9, 31), 3), (64, 128, (5, 7), 3), (12, 33, (5, 7, 3), 6), (5, 3, (77,), 2),
        (1, 16, (50,), 4), (3, 1, (1,), 1),
    ]  # fmt: skip
    for k, c, spatial, n_steps in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            problem = in_single(gm_problem(k=k, c=c, spatial=spatial, n_steps=n_steps), dtype, device)
            name = f"K={k} C={c} S={spatial} N={n_steps} {str(dtype).removeprefix('torch.')}"
            yield name, "gm_rollout", problem, GM_LEAVES, n_steps, {}
            problem = problem | {"target": 0.5 * problem["x_src"].flip(0)}
            keep = (torch.arange(2 * k, device=device) % 3 != 1).reshape(2, k)
            options = {"local": torch.tensor([True, False], device=device), "temperature": 0.5, "keep": keep}
            yield name, "gm_mean_velocity_loss", problem, [*GM_LEAVES, "target"], n_steps, options


def dx_cases(device: str) -> Iterator[tuple[str, str, dict[str, Any], list[str], int, dict[str, Any]]]:
    for mode in ("grid", "polynomial"):
        for dtype in (torch.float32, torch.bfloat16):
            problem = in_single(dx_problem(n_grid=10, c=16, spatial=(3, 31, 17), n_steps=13), dtype, device)
            name = f"N=10 {mode} {str(dtype).removeprefix('torch.')}"
            yield name, "dx_rollout", problem, DX_LEAVES, 13, {"mode": mode}
            problem = problem | {"target": 0.5 * problem["x_src"]}
            yield name, "dx_mean_velocity_loss", problem, [*DX_LEAVES, "target"], 13, {"mode": mode}


def compare(
    operator: str, problem: dict[str, Any], leaves: list[str], n_steps: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Errors of value and gradients relative to float64, and the float32 textbook's; whether they are within bounds."""
    call = getattr(pk, operator)
    actual = values_and_gradients(call, problem, leaves, backend="triton", **options)
    again = values_and_gradients(call, problem, leaves, backend="triton", **options)
    exact = values_and_gradients(call, in_double(problem), leaves, backend="reference", **options)
    textbook = values_and_gradients(call, problem, leaves, backend="reference", **options)
    repeated = all(torch.equal(a, b) for a, b in zip(actual, again))
    verdict = judge(["value", *leaves], actual, exact, textbook, n_steps)
    errors = {name: [ours, theirs] for name, (ours, theirs, _) in verdict.errors.items()}
    return {"passed": repeated and verdict.within_bounds, "errors": errors}


def graph_capture(device: str) -> bool:
    """A captured rollout follows its inputs when it is replayed."""
    problem = in_single(gm_problem(k=8, c=16, spatial=(16, 16)), torch.bfloat16, device)
    pk.gm_rollout(**problem, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = pk.gm_rollout(**problem, backend="triton")
    problem["means"].mul_(0.5)
    problem["sigmas"].mul_(0.9)
    graph.replay()
    return torch.equal(result, pk.gm_rollout(**problem, backend="triton"))


def full_graph_compile(device: str) -> bool:
    """torch.compile(fullgraph=True), value and gradient, over two noise levels and two sizes."""
    compiled = torch.compile(lambda problem: pk.gm_rollout(**problem, backend="triton") * 2, fullgraph=True)
    good = True
    for size in (12, 20):
        problem = in_single(gm_problem(k=8, c=16, spatial=(size, 9)), torch.float32, device)
        for scale in (1.0, 0.9):
            problem["sigmas"] = problem["sigmas"] * scale
            means = problem["means"].clone().requires_grad_()
            expected = pk.gm_rollout(**{**problem, "means": means}, backend="triton") * 2
            actual = compiled({**problem, "means": means})
            pairs = [(actual, expected)]
            pairs.append(tuple(torch.autograd.grad(x.sum(), means)[0] for x in (actual, expected)))
            good &= all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)
    return good


def large_tensors(device: str) -> bool:
    """Offsets beyond 2^31 elements, forward and backward."""
    far, pixels = 2**31 + 8, 1000
    store = torch.empty(far + pixels, dtype=torch.bfloat16, device=device)
    means = store.as_strided((1, 2, 1, 1, pixels), (store.numel(), far, pixels, pixels, 1))
    means.copy_(torch.randn(means.shape))
    x, weights = torch.randn(1, 1, 1, pixels, device=device), torch.randn(1, 2, 1, 1, pixels, device=device)
    levels = torch.tensor([0.9, 0.5, 0.2], device=device)
    results = [
        values_and_gradients(
            lambda x_start, backend, m=m: pk.gm_rollout(x_start, levels, x, 1.0, m, -1.0, weights, backend=backend),
            {"x_start": x}, ["x_start"], backend="triton",
        )
        for m in (means, means.contiguous())
    ]  # fmt: skip
    return all(torch.equal(a, b) for a, b in zip(*results))


def other_device(device: str) -> bool:
    """Tensors on the last GPU while another is current."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    problem = gm_problem(k=8, c=16, spatial=(8, 8))
    here, there = (
        pk.gm_rollout(**in_single(problem, torch.float32, d), backend="triton").cpu() for d in (device, last)
    )
    return torch.equal(here, there)


def correctness(device: str) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, operator, problem, leaves, n_steps, options in (*gm_cases(device), *dx_cases(device)):
        key = f"{operator} {name}"
        report[key] = compare(operator, problem, leaves, n_steps, options)
        print("ok  " if report[key]["passed"] else "FAIL", key, flush=True)
    if device == "cuda":
        for check in (graph_capture, full_graph_compile, large_tensors, other_device):
            report[check.__name__] = {"passed": check(device)}
            print("ok  " if report[check.__name__]["passed"] else "FAIL", check.__name__, flush=True)
    return report


def overhead() -> dict[str, Any]:
    """Microseconds that the host spends on one call: many calls of a tiny problem, queued without waiting."""
    problem = in_single(gm_problem(batch=1, k=8, c=16, spatial=(4, 4), n_steps=4), torch.bfloat16, "cuda")
    calls = 2000
    with torch.no_grad():
        for _ in range(50):
            pk.gm_rollout(**problem)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            pk.gm_rollout(**problem)
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
    print(f"gm_rollout: {spent / calls * 1e6:.1f} us of the host a call")
    return {"gm_rollout_us": spent / calls * 1e6}


def main(arguments: Sequence[str] | None = None) -> int:
    parts = ("correctness", "benchmarks", "overhead", "table")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="parts to run")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="to benchmark, such as qwen-image-1024")
    parser.add_argument("--force", action="store_true", help="go on where a check of correctness has failed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: correctness, interpreted")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is to be seen; TRITON_INTERPRET=1 with --device cpu --only correctness runs without one")
    if options.device == "cpu" and options.only != ["correctness"]:
        parser.error("--device cpu runs nothing but --only correctness")
    facts = machine() | {"fp_fusion": triton.knobs.language.default_fp_fusion}
    folder = options.out / re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)

    def store(name: str, result: dict[str, Any]) -> None:
        (folder / f"{name}.json").write_text(json.dumps({"machine": facts, name: result}, indent=1) + "\n")

    if "correctness" in options.only:
        report = correctness(options.device)
        fused = triton.knobs.language.default_fp_fusion
        store("correctness" if fused else "correctness-without-fp-fusion", report)
        failing = [name for name, result in report.items() if not result["passed"]]
        if failing:
            print(f"{len(failing)} of {len(report)} checks failed:", *failing, sep="\n")
            if not options.force:
                return 1
    if "benchmarks" in options.only:
        words = ["--suite", "all", "--device", "cuda", "--json", str(folder / "benchmarks.json")]
        run.main([*words, "--cases", *options.cases] if options.cases else words)
    if "overhead" in options.only:
        store("overhead", overhead())
    if "table" in options.only:
        store("launch_table", search())
    print(f"results are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
