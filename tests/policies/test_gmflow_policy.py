import pytest
import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule
from piflow.policies import GMFlowPolicy, auto_temperature, resolve_temperature
from tests.golden_vectors import Case, load_group

DTYPES = {"f32": torch.float32, "f64": torch.float64}
ROLLOUT = {torch.float32: 2e-5, torch.float64: 1e-9}
VELOCITY = {torch.float32: 1e-4, torch.float64: 1e-9}
GRADIENT = {torch.float32: 2e-4, torch.float64: 1e-7}
SIGMA_FLOOR_FLOAT32 = 2e-2  # below, the reference's own float32 is noise (golden/README.md)

TEMPERATURES = [case for case in load_group("g03_temperature_dropout").cases if "temp" in case.id and case.id[0] != "g"]
DROPOUTS = [case for case in load_group("g03_temperature_dropout").cases if "drop" in case.id]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def schedule_of(case: Case) -> NoiseSchedule:
    sampler = case.scalars.get("sampler", {"shift": 3.2})
    return NoiseSchedule(**{name: value for name, value in sampler.items() if name != "num_timesteps"})


def make_policy(seed: int = 0, batch: int = 2, space: tuple[int, ...] = (3, 4), components: int = 4) -> GMFlowPolicy:
    generator = torch.Generator().manual_seed(seed)
    return GMFlowPolicy(
        torch.randn(batch, components, 3, *space, generator=generator),
        0.3 * torch.randn(batch, 1, 1, *[1] * len(space), generator=generator) - 1,
        torch.randn(batch, components, 1, *space, generator=generator),
        torch.randn(batch, 3, *space, generator=generator),
        torch.linspace(1, 0.8, batch),
    )


def exact_twin(case: Case) -> Case:
    """The float64 run of the case, unless rounding gave it another number of substeps.

    The reference's float32 gradients are themselves up to 4e-4 from its float64 ones (neg_end, d_logstds).
    """
    twin = load_group("g02_gmflow_integrate_P")[case.id.removesuffix("f32").removesuffix("f64") + "f64"]
    return twin if twin.scalars["num_substeps"] == case.scalars["num_substeps"] else case


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", load_group("g02_gmflow_integrate_P").cases, ids=lambda case: case.id)
def test_integrate_agrees_with_golden(case: Case, backend: str | None) -> None:
    dtype, scalars = DTYPES[case.raw["dtype"]], case.scalars
    inputs = {name: value.to(dtype) for name, value in case.inputs.items()}
    names = ("means", "logstds", "logweights", "x_t_src", "x_t_start")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    schedule = schedule_of(case)
    sigma_src = schedule.sigma(inputs["raw_t_src"], scalars["seq_len"])
    policy = GMFlowPolicy(*[leaves[name] for name in names[:4]], sigma_src, eps=scalars["eps"], backend=backend)
    x_end = policy.integrate(
        leaves["x_t_start"],
        inputs["raw_t_start"],
        inputs["raw_t_end"],
        schedule,
        scalars["total_substeps"],
        scalars["seq_len"],
    )
    assert_near(x_end, case.outputs["x_t_end"], ROLLOUT[dtype])
    if "d_means" not in case.outputs:
        return
    (x_end * inputs["proj"]).sum().backward()
    # The reference's branch at the source state loses these two gradients unless sigma_src is 1 (golden/README.md).
    lost = scalars["pi_calls_in_softmax_branch"] == [0] and bool((sigma_src < 1).any())
    for name in names[:3] if lost else names:
        gradient = leaves[name].grad
        assert gradient is not None
        assert_near(gradient, exact_twin(case).outputs[f"d_{name}"].to(dtype), GRADIENT[dtype])


@pytest.mark.parametrize("case", TEMPERATURES, ids=lambda case: case.id)
def test_temperature_agrees_with_golden(case: Case) -> None:
    dtype, scalars = DTYPES[case.raw["dtype"]], case.scalars
    inputs = {name: value.to(dtype) for name, value in case.inputs.items()}
    plain = policy_of(inputs, eps=scalars["eps"])
    policy = plain.with_temperature(scalars["temp"])
    assert plain.temperature is None
    check_velocities_and_rollout(policy, inputs, case, dtype)


@pytest.mark.parametrize("case", DROPOUTS, ids=lambda case: case.id)
def test_dropout_agrees_with_golden(case: Case) -> None:
    plain = policy_of(case.inputs, eps=1e-6)
    policy = plain.with_dropout(case.scalars["p"], draw=case.inputs["draw"])
    assert plain.keep is None
    kept = torch.ones(plain.means.shape[:2], dtype=torch.bool) if policy.keep is None else policy.keep
    torch.testing.assert_close(kept, ~case.outputs["mask"])
    check_velocities_and_rollout(policy, case.inputs, case, torch.float32)


def policy_of(inputs: dict[str, Tensor], eps: float) -> GMFlowPolicy:
    names = ("means", "logstds", "logweights", "x_t_src", "sigma_t_src")
    return GMFlowPolicy(*[inputs[name] for name in names], eps=eps)


def check_velocities_and_rollout(
    policy: GMFlowPolicy, inputs: dict[str, Tensor], case: Case, dtype: torch.dtype
) -> None:
    usable = (inputs["sigma_t"] >= SIGMA_FLOOR_FLOAT32) | (dtype == torch.float64)
    pi = policy.velocity(inputs["x_t"], inputs["sigma_t"])
    assert_near(pi[usable], case.outputs["pi"][usable], VELOCITY[dtype])
    assert_near(policy.velocity(policy.x_src, policy.sigma_src), case.outputs["pi_src"], VELOCITY[dtype])
    sigmas = schedule_of(case).substep_sigmas(
        inputs["raw_t_src"], inputs["raw_t_end"], case.scalars["total_substeps"], case.scalars.get("seq_len")
    )
    sigmas[:, 0] = policy.sigma_src  # float32 in both runs, and where the reference's first substep starts
    x_end = policy.rollout(policy.x_src, sigmas)
    assert_near(x_end, case.outputs["x_t_end"], ROLLOUT[dtype])


def test_detach_stops_every_gradient() -> None:
    policy = make_policy()
    live = GMFlowPolicy(
        policy.means.requires_grad_(),
        policy.logstds.requires_grad_(),
        policy.logweights.requires_grad_(),
        policy.x_src.requires_grad_(),
        policy.sigma_src,
    )
    x_start = live.x_src.detach()
    sigmas = torch.linspace(0.8, 0, 5)[None]
    assert live.rollout(x_start, sigmas).requires_grad
    detached = live.with_temperature(0.5).detach()
    assert not detached.rollout(x_start, sigmas).requires_grad
    assert detached.temperature == 0.5


def test_dropout_repeats_with_its_generator() -> None:
    policy = make_policy(batch=8, components=8)
    first, second, third = (
        policy.with_dropout(0.5, generator=torch.Generator().manual_seed(seed)).keep for seed in (3, 3, 4)
    )
    assert first is not None
    assert second is not None
    assert third is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_dropping_all_drops_none() -> None:
    policy = make_policy()
    draw = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.9, 0.3, 0.4]])
    dropped = policy.with_dropout(0.5, draw=draw)
    assert dropped.keep is not None
    assert dropped.keep.tolist() == [[True] * 4, [False, True, False, False]]
    everything = policy.with_dropout(1.0)
    assert everything.keep is not None
    assert everything.keep.all()
    again = dropped.with_dropout(0.5, draw=1 - draw)  # the second sample's only component goes: it falls back to it
    assert again.keep is not None
    assert again.keep.tolist() == [[True] * 4, [False, True, False, False]]


def test_no_dropout_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    policy = make_policy()
    assert policy.with_dropout(0.0, generator=generator) is policy
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("space", [(6,), (3, 4), (2, 3, 4)])
def test_mean_velocity_is_the_rollout_over_its_length(space: tuple[int, ...]) -> None:
    policy = make_policy(space=space)
    sigmas = torch.stack([torch.linspace(0.8, 0.2, 7), torch.linspace(0.7, 0.7, 7)])
    local = torch.tensor([False, False])
    x_start = torch.randn(policy.x_src.shape, generator=torch.Generator().manual_seed(1))
    mean = policy.mean_velocity(x_start, sigmas, local)
    expected = (x_start - policy.rollout(x_start, sigmas)) / 0.6
    torch.testing.assert_close(mean[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean[1], policy.velocity(x_start, sigmas[:, 0])[1], rtol=1e-5, atol=1e-5)
    target = torch.zeros_like(x_start)
    loss = policy.mean_velocity_loss(x_start, sigmas, target, local)
    torch.testing.assert_close(loss, mean.square().flatten(1).mean(1))


def test_auto_temperature() -> None:
    assert [resolve_temperature("auto", nfe) for nfe in (1, 2, 5, 11, 50)] == pytest.approx([0, 0.1, 0.4, 1, 1])
    assert auto_temperature(4) == pytest.approx(0.3)
    assert resolve_temperature(None, 4) is None
    assert resolve_temperature(0.7, 4) == 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda policy: policy.with_temperature(-0.1), "temperature: expected a finite number, at least 0"),
        (lambda policy: policy.with_temperature(float("nan")), "temperature: expected a finite number"),
        (lambda policy: policy.with_temperature("hot"), "temperature: expected a number, 'auto' or None, got 'hot'"),
        (lambda policy: policy.with_temperature("auto"), "temperature: 'auto' depends on nfe, .* resolve_temperature"),
        (lambda policy: policy.with_dropout("x"), "p: expected a dropout probability within .* got 'x'"),
        (lambda policy: policy.with_dropout(1.5), "p: expected a dropout probability"),
        (lambda policy: policy.with_dropout(0.5, draw=torch.rand(2, 3)), "draw: expected .* shape \\(2, 4\\)"),
        (lambda policy: policy.velocity(torch.zeros(2, 3, 4, 3), torch.ones(2)), "x_t: expected shape"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(make_policy())
