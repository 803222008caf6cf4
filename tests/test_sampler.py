import inspect
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import piflow.distillation
import piflow.policies
import piflow.sampler
from piflow.noise_schedule import NoiseSchedule, segments
from piflow.policies import GMFlowPolicy, Policy
from piflow.sampler import PolicyFn, SampleStep, dx_policy_fn, gm_policy_fn, sample
from piflow.schedulers import FlowMapSDEScheduler

SCHEDULE = NoiseSchedule(3.2)


def gm_network(x_src: Tensor, sigma_src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four components that depend on the state and on the noise level."""
    level = sigma_src.reshape(-1, *[1] * x_src.dim())
    offsets = torch.linspace(-1, 1, 4).reshape(1, 4, *[1] * (x_src.dim() - 1))
    means = torch.tanh(x_src)[:, None] * level + offsets
    return means, torch.full_like(level, -1.5), torch.cos(3 * means[:, :, :1])


def dx_network(x_src: Tensor, sigma_src: Tensor) -> Tensor:
    return gm_network(x_src, sigma_src)[0]


def noise_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("space", [(6,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("policy_fn", [gm_policy_fn(gm_network), dx_policy_fn(dx_network)], ids=["gm", "dx"])
def test_any_nfe_and_any_number_of_spatial_axes(nfe: int, space: tuple[int, ...], policy_fn: PolicyFn) -> None:
    steps: list[SampleStep] = []
    x = sample(
        policy_fn,
        noise_of(2, 3, *space),
        nfe,
        schedule=SCHEDULE,
        final_step_size_scale=0.5,
        total_substeps=16,
        callback=lambda step, x: steps.append(step),
    )
    assert x.shape == (2, 3, *space)
    assert x.isfinite().all()
    assert [(step.raw_t_src, step.segment_size) for step in steps] == [pytest.approx(s) for s in segments(nfe, 0.5)]
    assert [step.is_last for step in steps] == [False] * (nfe - 1) + [True]


@pytest.mark.parametrize("nfe", [1, 2, 4, 5])
@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, float("inf")])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_steps_agree_with_the_scheduler(nfe: int, h: float, scale: float) -> None:
    noise, total = noise_of(2, 3, 4, 5), 64
    ours = sample(
        gm_policy_fn(gm_network),
        noise,
        nfe,
        schedule=SCHEDULE,
        total_substeps=total,
        final_step_size_scale=scale,
        h=h,
        generator=torch.Generator().manual_seed(7),
    )
    scheduler = FlowMapSDEScheduler(shift=3.2, final_step_size_scale=scale, h=h)
    scheduler.set_timesteps(nfe)
    generator = torch.Generator().manual_seed(7)
    x = noise
    # Times of segments are exact; the scheduler's, through float32 levels and back, may round into a substep more.
    raw_t_src = torch.tensor([raw_t for raw_t, _ in segments(nfe, scale)])
    raw_t_dst = scheduler.raw_t(scheduler.timesteps_dst)
    if h == 0:
        raw_t_dst = torch.cat([raw_t_src[1:], torch.zeros(1)])
    torch.testing.assert_close(raw_t_src, scheduler.raw_t(scheduler.timesteps))
    for i, timestep in enumerate(scheduler.timesteps):
        sigma_src = scheduler.sigmas[i].expand(2)
        policy = GMFlowPolicy(*gm_network(x, sigma_src), x, sigma_src)
        x_dst = policy.integrate(x, raw_t_src[i].expand(2), raw_t_dst[i].expand(2), SCHEDULE, total)
        x = scheduler.step(x_dst, timestep, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5 * float(x.abs().max()))


def test_stochastic_samples_repeat_with_their_generator() -> None:
    noise = noise_of(2, 3, 4)
    draws = [
        sample(gm_policy_fn(gm_network), noise, 3, h=0.7, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    once = [
        sample(gm_policy_fn(gm_network), noise, 1, h=0.7, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    ]
    assert torch.equal(once[0], once[1])  # the only step is the last one: it adds no noise


def test_temperature_spares_the_last_step() -> None:
    seen: list[tuple[int, float | None]] = []

    class Recorder(GMFlowPolicy):
        def with_temperature(self, temperature: float | None) -> "Recorder":
            seen.append((len(seen), temperature))
            return super().with_temperature(temperature)  # type: ignore[return-value]

    def policy_fn(x_src: Tensor, sigma_src: Tensor, step: SampleStep) -> Policy:
        return Recorder(*gm_network(x_src, sigma_src), x_src, sigma_src)

    noise = noise_of(2, 3, 4)
    sample(policy_fn, noise, 4, temperature="auto")
    assert seen == [(0, pytest.approx(0.3)), (1, pytest.approx(0.3)), (2, pytest.approx(0.3))]
    one_step = [sample(gm_policy_fn(gm_network), noise, 1, temperature=t) for t in (None, 0.1)]
    assert torch.equal(one_step[0], one_step[1])
    two_steps = [sample(gm_policy_fn(gm_network), noise, 2, temperature=t) for t in (None, 0.1, 1.0)]
    assert not torch.equal(two_steps[0], two_steps[1])
    assert torch.equal(two_steps[0], two_steps[2])


def test_network_outputs_may_be_attributes_keys_or_a_tuple() -> None:
    noise, names = noise_of(2, 3, 4), ("means", "logstds", "logweights")
    expected = sample(gm_policy_fn(gm_network), noise, 2)
    as_keys = gm_policy_fn(lambda x, sigma: dict(zip(names, gm_network(x, sigma))))
    as_attributes = gm_policy_fn(lambda x, sigma: SimpleNamespace(**dict(zip(names, gm_network(x, sigma)))))
    assert torch.equal(sample(as_keys, noise, 2), expected)
    assert torch.equal(sample(as_attributes, noise, 2), expected)


def test_a_perfect_dx_policy_ends_at_its_x_0() -> None:
    x_0 = noise_of(2, 3, 4, 5, seed=1)

    def network(x_src: Tensor, sigma_src: Tensor) -> Tensor:
        velocity = (x_src - x_0) / sigma_src.reshape(-1, 1, 1, 1)
        return velocity[:, None].expand(-1, 3, -1, -1, -1)

    for nfe in (1, 2, 4):
        for h in (0.0, 1.0):
            x = sample(dx_policy_fn(network), noise_of(2, 3, 4, 5), nfe, schedule=SCHEDULE, h=h)
            torch.testing.assert_close(x, x_0, rtol=0, atol=1e-4)


def test_states_are_at_least_float32_and_no_graph_is_built() -> None:
    weight = torch.ones(1, requires_grad=True)
    policy_fn = gm_policy_fn(lambda x, sigma: tuple(weight * output for output in gm_network(x, sigma)))
    x = sample(policy_fn, noise_of(2, 3, 4).bfloat16(), 2)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert sample(policy_fn, noise_of(2, 3, 4).double(), 2).dtype == torch.float64


def test_dynamic_shift_needs_the_sequence_length() -> None:
    schedule = NoiseSchedule(use_dynamic_shifting=True)
    shifts: list[float] = []
    sample(
        dx_policy_fn(dx_network),
        noise_of(2, 3, 4),
        2,
        schedule=schedule,
        seq_len=1024,
        callback=lambda step, x: shifts.append(step.shift),
    )
    assert shifts == [schedule.shift_for(1024)] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe: expected a whole number, at least 1, got 0"),
        ({"nfe": 1.5}, "nfe: expected a whole number"),
        ({"temperature": -1.0}, "temperature: expected a finite number, at least 0"),
        ({"temperature": "warm"}, "temperature: expected a number, 'auto' or None, got 'warm'"),
        ({"h": -0.5}, "h: expected a number, at least 0"),
        ({"h": None}, "h: expected a number, at least 0 .* got None"),
        ({"h": "x"}, "h: expected a number, at least 0 .* got 'x'"),
        ({"total_substeps": 0}, "total_substeps: expected a whole number, at least 1, got 0"),
        ({"total_substeps": "8"}, "total_substeps: expected a whole number, at least 1, got '8'"),
        ({"final_step_size_scale": -1.0}, "final_step_size_scale: expected"),
        ({"final_step_size_scale": "x"}, "final_step_size_scale: expected a finite number, at least 0, got 'x'"),
        ({"noise": torch.full((1, 2, 3), float("nan"))}, "noise: expected finite numbers, found NaN"),
        ({"noise": torch.zeros(2, 3)}, "noise: expected \\(B, C, \\*S\\) with one to three spatial axes"),
        ({"noise": torch.zeros(1, 2, 3, dtype=torch.long)}, "noise: expected a floating-point tensor"),
    ],
)
def test_errors_name_the_argument(settings, message: str) -> None:  # type: ignore[no-untyped-def]
    arguments = {"noise": noise_of(1, 2, 3), "nfe": 2, **settings}
    with pytest.raises(ValueError, match=message):
        sample(gm_policy_fn(gm_network), **arguments)


def test_policy_of_another_shape_is_an_error() -> None:
    def policy_fn(x_src: Tensor, sigma_src: Tensor, step: SampleStep) -> Policy:
        return GMFlowPolicy(*gm_network(x_src[:1], sigma_src[:1]), x_src[:1], sigma_src[:1])

    with pytest.raises(
        ValueError, match="policy_fn: expected a policy for states \\(2, 3, 4\\), got one for \\(1, 3, 4\\)"
    ):
        sample(policy_fn, noise_of(2, 3, 4), 1)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda means, logstds, logweights: (means, logweights), "got tuple with \\(Tensor, Tensor\\)"),
        (lambda *outputs: list(outputs), "got list with \\(NoneType, NoneType, NoneType\\)"),
        (lambda means, *rest: {"means": means}, "got dict with \\(Tensor, NoneType, NoneType\\)"),
        (lambda *outputs: None, "got NoneType with"),
    ],
)
def test_network_output_of_another_form_is_an_error(output, got: str) -> None:  # type: ignore[no-untyped-def]
    policy_fn = gm_policy_fn(lambda x, sigma: output(*gm_network(x, sigma)))
    with pytest.raises(ValueError, match=f"network: expected tensors means, logstds and logweights .* {got}"):
        sample(policy_fn, noise_of(2, 3, 4), 1)


def test_dx_network_without_a_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"network: expected a tensor grid .* got tuple"):
        sample(dx_policy_fn(gm_network), noise_of(2, 3, 4), 1)  # type: ignore[arg-type]


def test_no_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"policy_fn: expected a Policy, .* got NoneType"):
        sample(lambda x_src, sigma_src, step: None, noise_of(2, 3, 4), 1)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("h", [0.0, 0.5])
def test_an_empty_batch_stays_empty(h: float) -> None:
    calls: list[SampleStep] = []
    x = sample(gm_policy_fn(gm_network), torch.zeros(0, 3, 4), 2, h=h, callback=lambda step, x: calls.append(step))
    assert x.shape == (0, 3, 4)
    assert calls == []


@pytest.mark.parametrize("module", [piflow.policies.base, piflow.policies, piflow.distillation, piflow.sampler])
def test_public_names_say_what_they_do(module: ModuleType) -> None:
    public = [member for name, member in vars(module).items() if not name.startswith("_")]
    documentable = [member for member in public if inspect.isfunction(member) or inspect.isclass(member)]
    ours = [member for member in documentable if member.__module__.startswith("piflow.")]
    assert ours
    for member in ours:
        assert member.__doc__, member
        for name, attribute in vars(member).items():
            if not name.startswith("_") and (inspect.isfunction(attribute) or isinstance(attribute, property)):
                assert attribute.__doc__, f"{member.__name__}.{name}"
