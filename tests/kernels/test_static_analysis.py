"""What `benchmarks.static_analysis` reads from machine code, on kernels whose arithmetic is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.static_analysis import (  # noqa: E402
    AnalysisError,
    KernelFacts,
    Request,
    analyse,
    analyse_all,
    cache_folder,
    compile_for,
    failures,
    occupancy,
)

CAPABILITIES = [80, 90, 100]


@triton.jit
def unrolled_by_ptxas_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """2 fma and an exp2 a substep."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    for n in range(n_steps):
        a = tl.load(steps + n)
        y = tl.exp2(tl.fma(tl.fma(y, a, a), y, a))
    tl.store(out + i, y)


@triton.jit
def nothing_loaded_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """3 fma a substep, and a setup that does not count."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    z = tl.fma(y, y, 1.0)
    for _ in range(n_steps):
        y = tl.fma(tl.fma(tl.fma(y, y, z), z, y), y, z)
    tl.store(out + i, y)


@triton.jit
def static_components_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """K fma and 1 multiplication a substep."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    for n in range(n_steps):
        a = tl.load(steps + n)
        z = y * a
        for k in tl.static_range(K):
            z = tl.fma(z, y, a + k)
        y = z
    tl.store(out + i, y)


@triton.jit
def streamed_components_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """K times 2 fma and 1 exp2, and once more an exp2, a substep."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    for n in range(n_steps):
        a = tl.load(steps + n)
        z = y
        for k in range(K):
            v = tl.load(x + (k + 1) * 65536 + i)
            z = tl.exp2(tl.fma(tl.fma(v, z, a), v, y))
        y = tl.exp2(z)
    tl.store(out + i, y)


@triton.jit
def two_passes_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """A loop over substeps with 1 fma; then, for each of K components, one with 2."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    for n in range(n_steps):
        y = tl.fma(y, y, tl.load(steps + n))
    for k in range(K):
        z = tl.load(x + (k + 1) * 65536 + i)
        for m in range(n_steps):
            a = tl.load(steps + m)
            z = tl.fma(tl.fma(z, y, a), z, a)
        tl.store(out + (k + 1) * 65536 + i, z)
    tl.store(out + i, y)


@triton.jit
def other_bound_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """Within a substep a loop whose length is in memory."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    for n in range(n_steps):
        for _ in range(tl.load(steps + n).to(tl.int32)):
            y = tl.fma(y, y, tl.load(x + n))
    tl.store(out + i, y)


@triton.jit
def many_values_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    """K values stay alive over the loop."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = ()
    for k in tl.static_range(K):
        values = values + (tl.load(x + k * 65536 + i),)  # noqa: RUF005
    for n in range(n_steps):
        a = tl.load(steps + n)
        following = ()
        for k in tl.static_range(K):
            following = following + (tl.fma(values[k], a, values[(k + 1) % K]),)  # noqa: RUF005
        values = following
    for k in tl.static_range(K):
        tl.store(out + k * 65536 + i, values[k])


@triton.jit
def in_float64(x, steps, out, n_steps, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i).to(tl.float64)
    for n in range(n_steps):
        y = tl.fma(y, y, tl.load(steps + n).to(tl.float64))
    tl.store(out + i, y.to(tl.float32))


@triton.jit
def float64_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    in_float64(x, steps, out, n_steps, BLOCK)


@triton.jit
def float64_coefficients_kernel(x, steps, out, n_steps, K: tl.constexpr, BLOCK: tl.constexpr):
    in_float64(x, steps, out, n_steps, BLOCK)


def request(kernel: Any, capability: int = 90, k: int = 1, **changes: Any) -> Request:
    arguments = {
        "kernel": f"{__name__}:{kernel.__name__}",
        "signature": dict.fromkeys(("x", "steps", "out"), "*fp32")
        | {"n_steps": "i32", "K": "constexpr", "BLOCK": "constexpr"},
        "constants": {"K": k, "BLOCK": 128},
        "divisible": frozenset({"x", "steps", "out"}),
        "num_warps": 4,
        "capability": capability,
        "block": 128,
    }
    return Request(**arguments | changes)


def facts_of(kernel: Any, capability: int = 90, k: int = 1, maxnreg: int | None = None, **options: Any) -> KernelFacts:
    r = request(kernel, capability, k)
    num_warps = options.pop("num_warps", r.num_warps)
    compiled = compile_for(
        kernel, r.signature, r.constants, set(r.divisible), num_warps, capability, maxnreg=maxnreg
    )  # fmt: skip
    return analyse(compiled, 128, kernel=kernel.__name__, **options)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_loop_that_ptxas_unrolls_counts_once(capability: int) -> None:
    facts = facts_of(unrolled_by_ptxas_kernel, capability)
    (loop,) = facts.loops
    assert loop.copies > 1
    assert loop.trips is None
    assert (facts.ffma_per_substep, facts.mufu_per_substep) == (2, 1)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_copies_are_told_by_arithmetic_where_nothing_is_loaded(capability: int) -> None:
    facts = facts_of(nothing_loaded_kernel, capability)
    assert facts.loops[0].copies > 1
    assert facts.fma_per_substep == 3


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("k", [3, 20])
def test_static_components(k: int, capability: int) -> None:
    facts = facts_of(static_components_kernel, capability, k)
    assert (facts.ffma_per_substep, facts.fmul_per_substep) == (k, 1)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("k", [3, 64, 1000])
def test_streamed_components_count_as_often_as_they_run(k: int, capability: int) -> None:
    """Written out by LLVM, by ptxas, or a loop of several copies."""
    facts = facts_of(streamed_components_kernel, capability, k)
    assert (facts.ffma_per_substep, facts.mufu_per_substep) == (2 * k, k + 1)


@pytest.mark.parametrize("k", [2, 50])
def test_passes_over_substeps_add_up(k: int) -> None:
    assert facts_of(two_passes_kernel, k=k).ffma_per_substep == 1 + 2 * k


def test_threads_that_repeat_a_pixel_count() -> None:
    """8 warps for 128 pixels: every pixel is computed twice."""
    assert facts_of(nothing_loaded_kernel, num_warps=8).fma_per_substep == 6


def test_a_kernel_for_a_number_of_substeps_counts_whole() -> None:
    r = request(static_components_kernel, k=12)
    constants, signature = r.constants | {"n_steps": 4}, r.signature | {"n_steps": "constexpr"}
    four = compile_for(static_components_kernel, signature, constants, set(r.divisible), r.num_warps, 90)
    assert analyse(four, 128, substeps=4).ffma_per_substep == 12
    assert analyse(four, None).ffma_per_substep is None


def test_what_cannot_be_told_is_an_error() -> None:
    with pytest.raises(AnalysisError, match="not constant"):
        facts_of(other_bound_kernel)
    with pytest.raises(AnalysisError, match="no loop depends on 'n_levels'"):
        facts_of(unrolled_by_ptxas_kernel, substeps="n_levels")


def test_signature_and_kernel_are_checked() -> None:
    with pytest.raises(ValueError, match="signature: nothing_loaded_kernel takes"):
        compile_for(nothing_loaded_kernel, {"x": "*fp32"}, {}, set(), 4, 90)
    with pytest.raises(ValueError, match="kernel: expected a compiled Triton kernel"):
        compile_for(abs, {}, {}, set(), 4, 90)  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_spills_are_caught(capability: int) -> None:
    assert failures(facts_of(many_values_kernel, capability, k=64)) == []
    facts = facts_of(many_values_kernel, capability, k=64, maxnreg=32)
    assert facts.registers <= 32
    assert facts.spill_bytes > 0
    assert facts.local_instructions > 0
    assert "local memory" in failures(facts)[0]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_float64_is_caught_in_per_pixel_code(capability: int) -> None:
    facts = facts_of(float64_kernel, capability)
    assert facts.float64_instructions >= 3
    assert "float64" in failures(facts)[0]
    assert failures(facts_of(float64_coefficients_kernel, capability)) == []
    assert facts_of(streamed_components_kernel, capability, k=3).float64_instructions == 0


def test_multiply_adds_above_what_is_needed_fail() -> None:
    facts = facts_of(static_components_kernel, k=20)
    assert failures(facts, needed=41) == []
    assert "1.50x the 14" in failures(dataclasses.replace(facts, fma_per_substep=21.0), needed=14)[0]


def test_occupancy_is_what_the_calculator_says() -> None:
    assert occupancy(90, 32, 0, 4) == 1.0
    assert occupancy(90, 128, 0, 4) == 0.25  # 4096 registers a warp, 16 warps
    assert occupancy(90, 255, 0, 4) == 0.125
    assert occupancy(80, 32, 40 << 10, 4) == 4 * 4 / 64  # 164 KiB hold four blocks with 41
    assert occupancy(100, 32, 0, 1) == 0.5  # 32 blocks at most


def test_facts_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    requests = [request(unrolled_by_ptxas_kernel), request(streamed_components_kernel, k=64)]
    first = list(analyse_all(requests, workers=1))
    assert [facts.ffma_per_substep for facts in first if isinstance(facts, KernelFacts)] == [2, 128]

    path = cache_folder() / f"{requests[0].key()}.json"
    assert path.is_relative_to(tmp_path / "piflow")
    marked = json.loads(path.read_text()) | {"registers": 7}
    path.write_text(json.dumps(marked))
    (kept,) = analyse_all(requests[:1], workers=1)
    assert kept == dataclasses.replace(first[0], registers=7)  # type: ignore[type-var]

    for broken in ("", "{", "[]", json.dumps({"registers": 1})):
        path.write_text(broken)
        assert next(analyse_all(requests[:1], workers=1)) == first[0]
        assert json.loads(path.read_text())["registers"] != 7


def test_keys_follow_what_is_compiled() -> None:
    keys = {
        request(unrolled_by_ptxas_kernel).key(),
        request(nothing_loaded_kernel).key(),
        request(unrolled_by_ptxas_kernel, capability=80).key(),
        request(unrolled_by_ptxas_kernel, k=2).key(),
        request(unrolled_by_ptxas_kernel, divisible=frozenset()).key(),
        request(unrolled_by_ptxas_kernel, maxnreg=64).key(),
        request(unrolled_by_ptxas_kernel, enable_fp_fusion=False).key(),
    }
    assert len(keys) == 7
    assert request(unrolled_by_ptxas_kernel).key() in keys


def test_an_error_does_not_end_the_work_on_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed, done = analyse_all([request(other_bound_kernel), request(nothing_loaded_kernel)], workers=1)
    assert isinstance(failed, AnalysisError)
    assert "other_bound_kernel for sm_90" in str(failed)
    assert isinstance(done, KernelFacts)
