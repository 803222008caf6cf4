import pytest
import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule
from piflow.policies import DXPolicy
from tests.golden_vectors import Case, load_group

DTYPES = {"f32": torch.float32, "f64": torch.float64}
ROLLOUT = {torch.float32: 2e-5, torch.float64: 1e-9}
VELOCITY = {torch.float32: 1e-4, torch.float64: 1e-9}
GRADIENT = {torch.float32: 2e-4, torch.float64: 1e-7}
SIGMA_FLOOR_FLOAT32 = 2e-2  # below, the reference's own float32 is noise (golden/README.md)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", load_group("g04_dx").cases, ids=lambda case: case.id)
def test_policy_agrees_with_golden(case: Case, backend: str | None) -> None:
    dtype, scalars, outputs = DTYPES[case.raw["dtype"]], case.scalars, case.outputs
    inputs = {name: value.to(dtype) for name, value in case.inputs.items()}
    grid, x_src, x_start = (
        inputs[name].clone().requires_grad_() for name in ("denoising_output", "x_t_src", "x_t_src")
    )
    schedule = NoiseSchedule(scalars["sampler"]["shift"])
    sigma_src = schedule.sigma(inputs["raw_t_src"])
    torch.testing.assert_close(sigma_src, outputs["sigma_t_src"].flatten(), rtol=0, atol=0)
    policy = DXPolicy(
        grid,
        x_src,
        sigma_src,
        scalars["segment_size"],
        scalars["shift"],
        mode=scalars["mode"],
        eps=scalars["eps"],
        backend=backend,
    )
    queries = {name.removeprefix("pi_") for name in outputs if name.startswith("pi_")}
    for query in queries:
        sigma_t = outputs[f"sigma_{query}"].flatten() if query != "zero" else torch.zeros_like(sigma_src)
        usable = (sigma_t >= SIGMA_FLOOR_FLOAT32) | (dtype == torch.float64)
        if usable.any():
            pi = policy.velocity(x_src + 0.1 * inputs["proj"], sigma_t)
            assert_near(pi[usable], outputs[f"pi_{query}"][usable], VELOCITY[dtype])

    raw_t_end = outputs["raw_t_end"]
    x_end = policy.integrate(x_start, inputs["raw_t_src"], raw_t_end, schedule, scalars["total_substeps"])
    assert_near(x_end, outputs["x_t_end"], ROLLOUT[dtype])
    (x_end * inputs["proj"]).sum().backward()
    for name, leaf in (("denoising_output", grid), ("x_t_src", x_src), ("x_t_start", x_start)):
        assert leaf.grad is not None
        expected = outputs[f"d_{name}"]
        # A rollout to sigma 0 forgets its start: that gradient is rounding error, of the size that d x_end = proj has.
        scale = float(torch.maximum(expected.abs().max(), inputs["proj"].abs().max()))
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=GRADIENT[dtype] * scale)


def make_policy(space: tuple[int, ...] = (3, 4)) -> DXPolicy:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(2, 5, 3, *space, generator=generator)
    return DXPolicy(grid, torch.randn(2, 3, *space, generator=generator), torch.tensor([1.0, 0.8]), 0.5, 3.2)


@pytest.mark.parametrize("space", [(6,), (3, 4), (2, 3, 4)])
def test_mean_velocity_is_the_rollout_over_its_length(space: tuple[int, ...]) -> None:
    policy = make_policy(space)
    sigmas = torch.linspace(0.8, 0.6, 5)
    mean = policy.mean_velocity(policy.x_src, sigmas, torch.tensor([False, True]))
    torch.testing.assert_close(mean[0], ((policy.x_src - policy.rollout(policy.x_src, sigmas)) / 0.2)[0])
    torch.testing.assert_close(mean[1], policy.velocity(policy.x_src, torch.tensor([0.8, 0.8]))[1])
    loss = policy.mean_velocity_loss(policy.x_src, sigmas, torch.zeros_like(mean), torch.tensor([False, True]))
    torch.testing.assert_close(loss, mean.square().flatten(1).mean(1))


def test_detach_stops_every_gradient() -> None:
    policy = make_policy()
    live = DXPolicy(policy.grid.requires_grad_(), policy.x_src.requires_grad_(), policy.sigma_src, 0.5, 3.2)
    assert live.velocity(live.x_src.detach(), live.sigma_src).requires_grad
    assert not live.detach().velocity(live.x_src.detach(), live.sigma_src).requires_grad


def test_without_components_temperature_and_dropout_only_check() -> None:
    policy = make_policy()
    assert policy.with_temperature(0.1).with_dropout(0.9) is policy
    with pytest.raises(ValueError, match="temperature"):
        policy.with_temperature(-1)
    with pytest.raises(ValueError, match="temperature: 'auto' depends on nfe"):
        policy.with_temperature("auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p: expected"):
        policy.with_dropout(2)
