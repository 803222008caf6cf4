"""The operators against the reference vectors, with the tolerances that tests/golden/README.md gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import piflow_kernels as pk
from piflow.noise_schedule import NoiseSchedule
from tests.golden_vectors import Case, load_group

VELOCITY = {torch.float64: 1e-9, torch.float32: 1e-4}
ROLLOUT = {torch.float64: 1e-9, torch.float32: 2e-5}
GRADIENT = {torch.float64: 1e-7, torch.float32: 2e-4}
CANCELLATION_BELOW = 2e-2
"""sigma_t under which the reference's own float32 carries cancellation noise."""

BACKENDS = ["reference", "torch"]
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    """Within `tolerance` of the largest value of `scale`, by default `expected` itself."""
    scale = expected if scale is None else scale
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    torch.testing.assert_close(
        actual.to(torch.float64),
        expected.to(torch.float64),
        rtol=0,
        atol=tolerance * scale.abs().max().item() + 1e-300,
    )


def cases(group: str, prefix: str = "") -> list[Case]:
    return [case for case in load_group(group).cases if case.id.startswith(prefix)]


def case_id(case: object) -> str | None:
    return case.id if isinstance(case, Case) else None


def gm_inputs(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    names = {
        "x_src": "x_t_src",
        "sigma_src": "sigma_t_src",
        "means": "means",
        "logstds": "logstds",
        "logweights": "logweights",
    }
    return {ours: inputs[theirs].to(dtype) for ours, theirs in names.items()}


VELOCITY_CASES = [
    (case, suffix)
    for case in cases("g01_gmflow_pi_A") + cases("g01_gmflow_pi_B")
    for suffix in ("f32", "f64")
    if suffix in case.outputs and (suffix == "f64" or case.inputs["sigma_t"].min() >= CANCELLATION_BELOW)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "suffix"), VELOCITY_CASES, ids=case_id)
def test_gm_velocity(case: Case, suffix: str, backend: str) -> None:
    dtype = DTYPES[suffix]
    u = pk.gm_velocity(
        case.inputs["x_t"].to(dtype),
        case.inputs["sigma_t"].to(dtype),
        **gm_inputs(case.inputs, dtype),
        eps=case.scalars["eps"],
        backend=backend,
    )
    assert_close(u, case.outputs[suffix], VELOCITY[dtype])


GRADIENT_CASES = [
    case
    for case in cases("g01_gmflow_pi_B", "grad.")
    if case.outputs["d_means"].dtype == torch.float64 or case.inputs["sigma_t"].min() >= CANCELLATION_BELOW
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=case_id)
def test_gm_velocity_gradients(case: Case, backend: str) -> None:
    dtype = case.outputs["d_means"].dtype
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in gm_inputs(case.inputs, dtype).items()
        if name != "sigma_src"
    }
    x_t = case.inputs["x_t"].to(dtype, copy=True).requires_grad_()
    sigma_src = case.inputs["sigma_t_src"].to(dtype)
    u = pk.gm_velocity(
        x_t, case.inputs["sigma_t"].to(dtype), sigma_src=sigma_src, **leaves, eps=case.scalars["eps"], backend=backend
    )
    (u * case.inputs["proj"].to(dtype)).sum().backward()
    names = {"means": "d_means", "logstds": "d_logstds", "logweights": "d_logweights", "x_src": "d_x_t_src"}
    for name, golden in names.items():
        assert_close(leaves[name].grad, case.outputs[golden], GRADIENT[dtype])
    assert_close(x_t.grad, case.outputs["d_x_t"], GRADIENT[dtype])


POSTERIOR_CASES = [
    case
    for case in cases("g03_posterior_mean")
    if case.raw["dtype"] == "f64" or min(case.inputs[f"sigma_t{s}"].min() for s in ("", "_src")) >= CANCELLATION_BELOW
]


@pytest.mark.parametrize("case", POSTERIOR_CASES, ids=case_id)
def test_posterior_mean(case: Case) -> None:
    """x_0 = x_t - sigma u of the velocity operator is the posterior mean of a mixture given in x_0 space."""
    dtype = DTYPES[case.raw["dtype"]]
    i = {name: value.to(dtype) for name, value in case.inputs.items()}
    sigma, sigma_src = i["sigma_t"].flatten(), i["sigma_t_src"].flatten()
    s = sigma_src.reshape(-1, *[1] * (i["gm_means"].dim() - 1))
    means = (i["x_t_src"][:, None] - i["gm_means"]) / s
    logstds = 0.5 * torch.log(i["gm_vars"].flatten() / sigma_src**2)
    for backend in BACKENDS:
        u = pk.gm_velocity(
            i["x_t"], sigma, i["x_t_src"], sigma_src, means, logstds, i["gm_logweights"], case.scalars["eps"],
            backend=backend,
        )  # fmt: skip
        x_0 = i["x_t"] - sigma.clamp(min=case.scalars["eps"]).reshape(-1, *[1] * (u.dim() - 1)) * u
        assert_close(x_0, case.outputs["out"], VELOCITY[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", cases("g03_temperature_dropout", "P.temp") + cases("g03_temperature_dropout", "V.temp"), ids=case_id
)
def test_temperature(case: Case, backend: str) -> None:
    dtype = DTYPES[case.raw["dtype"]]
    u = pk.gm_velocity(
        case.inputs["x_t"].to(dtype),
        case.inputs["sigma_t"].to(dtype),
        **gm_inputs(case.inputs, dtype),
        eps=case.scalars["eps"],
        temperature=case.scalars["temp"],
        backend=backend,
    )
    assert_close(u, case.outputs["pi"], VELOCITY[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", cases("g03_temperature_dropout", "P.drop") + cases("g03_temperature_dropout", "V.drop"), ids=case_id
)
def test_dropout(case: Case, backend: str) -> None:
    draw = case.inputs["draw"]
    u = pk.gm_velocity(
        case.inputs["x_t"],
        case.inputs["sigma_t"],
        **gm_inputs(case.inputs, torch.float32),
        keep=draw.reshape(draw.shape[:2]) >= case.scalars["p"],
        backend=backend,
    )
    assert_close(u, case.outputs["pi"], VELOCITY[torch.float32])


def dx_arguments(case: Case, dtype: torch.dtype) -> dict[str, object]:
    return {
        "sigma_src": case.outputs["sigma_t_src"].to(dtype),
        "segment_size": case.scalars["segment_size"],
        "shift": case.scalars["shift"],
        "mode": case.scalars["mode"],
        "eps": case.scalars["eps"],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("g04_dx"), ids=case_id)
def test_dx_velocity(case: Case, backend: str) -> None:
    dtype = DTYPES[case.raw["dtype"]]
    x_src, grid = case.inputs["x_t_src"].to(dtype), case.inputs["denoising_output"].to(dtype)
    x_t = x_src + 0.1 * case.inputs["proj"].to(dtype)
    for name in ("src", "q25", "knot", "q99", "end", "past", "zero"):
        sigma_t = case.outputs[f"sigma_{name}"].to(dtype) if name != "zero" else torch.zeros(len(x_src), dtype=dtype)
        u = pk.dx_velocity(x_t, sigma_t, x_src, grid=grid, **dx_arguments(case, dtype), backend=backend)
        if dtype == torch.float64 or sigma_t.min() >= CANCELLATION_BELOW:
            assert_close(u, case.outputs[f"pi_{name}"], VELOCITY[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("g04_dx"), ids=case_id)
def test_dx_rollout_and_gradients(case: Case, backend: str) -> None:
    dtype = DTYPES[case.raw["dtype"]]
    x_src, grid, x_start = (
        case.inputs[name].to(dtype, copy=True).requires_grad_() for name in ("x_t_src", "denoising_output", "x_t_src")
    )
    levels = NoiseSchedule(case.scalars["shift"]).substep_sigmas(
        case.inputs["raw_t_src"].to(dtype), case.outputs["raw_t_end"].to(dtype), case.scalars["total_substeps"]
    )
    x_end = pk.dx_rollout(x_start, levels, x_src, grid=grid, **dx_arguments(case, dtype), backend=backend)
    (x_end * case.inputs["proj"].to(dtype)).sum().backward()
    assert_close(x_end.detach(), case.outputs["x_t_end"], ROLLOUT[dtype])
    assert_close(grid.grad, case.outputs["d_denoising_output"], GRADIENT[dtype])
    assert_close(x_src.grad, case.outputs["d_x_t_src"], GRADIENT[dtype])
    # A rollout to sigma 0 forgets x_start: its gradient is zero up to rounding of what adds up to that of x_src.
    assert_close(x_start.grad, case.outputs["d_x_t_start"], GRADIENT[dtype], scale=case.outputs["d_x_t_src"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("g02_gmflow_integrate_P"), ids=case_id)
def test_gm_rollout_and_gradients(case: Case, backend: str) -> None:
    dtype = DTYPES[case.raw["dtype"]]
    names = {
        "x_start": "x_t_start",
        "x_src": "x_t_src",
        "means": "means",
        "logstds": "logstds",
        "logweights": "logweights",
    }
    leaves = {ours: case.inputs[theirs].to(dtype, copy=True).requires_grad_() for ours, theirs in names.items()}
    levels = NoiseSchedule(case.scalars["shift_used"]).substep_sigmas(
        case.inputs["raw_t_start"].to(dtype), case.inputs["raw_t_end"].to(dtype), case.scalars["total_substeps"]
    )
    assert levels.shape[1] - 1 == max(case.scalars["num_substeps"])
    sigma_src = case.outputs["sigma_t_src"].to(dtype)
    x_end = pk.gm_rollout(sigmas=levels, sigma_src=sigma_src, **leaves, eps=case.scalars["eps"], backend=backend)
    (x_end * case.inputs["proj"].to(dtype)).sum().backward()
    assert_close(x_end.detach(), case.outputs["x_t_end"], ROLLOUT[dtype])
    if "d_means" not in case.outputs:  # recorded without gradients
        return
    # Gradients against the float64 run of the same rollout: the float32 vectors carry cancellation noise of their own
    # at low sigma (4e-4 in neg_end). Where rounding gave the float64 run another number of substeps, against float32.
    twin = load_group("g02_gmflow_integrate_P")[case.id.replace(".f32", ".f64")]
    gradients = (twin if twin.scalars["num_substeps"] == case.scalars["num_substeps"] else case).outputs
    for name in ("means", "logstds", "logweights"):
        assert_close(leaves[name].grad, gradients[f"d_{name}"], GRADIENT[dtype])
    # At the source state of a whole batch the reference differentiates softmax(logweights) . mu, without the states'
    # gradients (tests/golden/README.md): test_operators.py checks those against float64 autograd of the formula.
    if not case.scalars["pi_calls_in_softmax_branch"] or (sigma_src == 1).all():
        assert_close(leaves["x_src"].grad, gradients["d_x_t_src"], GRADIENT[dtype])
        assert_close(leaves["x_start"].grad, gradients["d_x_t_start"], GRADIENT[dtype])
