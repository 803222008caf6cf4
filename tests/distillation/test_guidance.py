from itertools import pairwise

import pytest
import torch
from torch import Tensor

from piflow.distillation import (
    flow_matching_loss,
    guidance_bias,
    guided_teacher,
    guided_velocity,
    velocity_from_x_0,
)
from piflow.noise_schedule import NoiseSchedule
from tests.golden_vectors import Case, load_group

CASES = load_group("g10_guidance").cases
VELOCITIES = [case for case in CASES if ".U." in case.id or ".X0." in case.id]
BIASES = [case for case in CASES if ".jit." in case.id]
SAMPLES = [case for case in CASES if ".sample." in case.id]
FLOW_MATCHING = [case for case in CASES if "fm_loss" in case.id]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def network(case: Case, x_t: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
    """The network of the vectors: W x + b[cond] + a sigma."""
    weight, bias, slope = (case.inputs[f"net.{name}"] for name in ("W", "b", "a"))
    ones = [1] * (x_t.dim() - 2)
    mixed = torch.einsum("dc,bc...->bd...", weight, x_t)
    return mixed + bias[cond].reshape(len(x_t), -1, *ones) + slope * sigma.reshape(-1, 1, *ones)


def interval_of(case: Case) -> tuple[float, float] | None:
    interval = case.scalars["test_cfg"].get("guidance_interval")
    return None if interval is None else (interval[0] / 1000, interval[1] / 1000)


@pytest.mark.parametrize("case", VELOCITIES, ids=lambda case: case.id)
def test_guided_velocity_agrees_with_golden(case: Case) -> None:
    x_t, sigma = case.inputs["x_t"], case.inputs["t"] / 1000
    outputs = [network(case, x_t, sigma, case.inputs[name]) for name in ("cond_pos", "cond_neg")]
    x_0 = None
    if case.scalars["denoising_mean_mode"] == "X0":
        x_0 = outputs[0]
        outputs = [velocity_from_x_0(output, x_t, sigma, case.scalars["sigma_min"]) for output in outputs]
    positive, negative = outputs
    assert_near(positive, case.outputs["u_pos"])
    guided = guided_velocity(
        positive,
        negative,
        case.scalars["guidance_scale"],
        x_t,
        sigma,
        orthogonal=float(case.scalars["test_cfg"]["orthogonal_guidance"]),
        interval=interval_of(case),
        parallel_dir=x_0,
    )
    assert_near(guided, case.outputs["u"])
    scale = float(case.outputs["u"].abs().max())
    torch.testing.assert_close(guided - positive, case.outputs["bias"], rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("case", BIASES, ids=lambda case: case.id)
def test_bias_agrees_with_golden(case: Case) -> None:
    dtype, tolerance = {"f32": (torch.float32, 1e-6), "f64": (torch.float64, 1e-12)}[case.raw["dtype"]]
    positive, negative, scale, direction = (
        case.inputs[name].to(dtype) for name in ("pos_mean", "neg_mean", "scale", "parallel_dir")
    )
    along = direction if case.scalars["parallel_dir"] else None
    bias = guidance_bias(positive, negative, scale, case.scalars["orthogonal"], along)
    assert_near(bias, case.outputs["bias"], tolerance)


@pytest.mark.parametrize("case", SAMPLES, ids=lambda case: case.id)
def test_euler_samples_of_the_guided_teacher_agree_with_golden(case: Case) -> None:
    config = case.scalars["test_cfg"]
    teacher = guided_teacher(
        lambda x_t, sigma, cond: network(case, x_t, sigma, cond),
        case.inputs["cond_pos"],
        case.inputs["cond_neg"],
        case.scalars["guidance_scale"],
        orthogonal=config["orthogonal_guidance"],
        interval=interval_of(case),
    )
    x = case.inputs["x_t"]
    sigmas = NoiseSchedule(case.scalars["shift"]).sigma(torch.linspace(1, 0, config["num_timesteps"] + 1))
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * teacher(x, sigma.expand(len(x)))
    assert_near(x, case.outputs["x"])


@pytest.mark.parametrize("case", FLOW_MATCHING, ids=lambda case: case.id)
def test_flow_matching_loss_agrees_with_golden(case: Case) -> None:
    for name in ("W", "b", "a"):
        case.inputs[f"net.{name}"].requires_grad_()
    result = flow_matching_loss(
        lambda x_t, sigma: network(case, x_t, sigma, case.inputs["cond_pos"]),
        case.inputs["x_t"],
        NoiseSchedule(case.scalars["shift"]),
        loss_scale=case.scalars["scale"],
        raw_t=1 - case.inputs["draw_t"],
        noise=case.inputs["draw_noise"],
    )
    assert_near(result.loss.detach(), case.outputs["loss"])
    assert_near(result.losses.detach().mean(), case.outputs["loss"])
    result.loss.backward()
    for name in ("W", "b", "a"):
        leaf = case.inputs[f"net.{name}"]
        assert leaf.grad is not None
        assert_near(leaf.grad, case.outputs[f"d_{name}"])
        leaf.requires_grad_(False)
        leaf.grad = None


def test_teacher_asks_once_and_only_what_it_needs() -> None:
    calls: list[int] = []

    def velocity(x_t: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        calls.append(len(x_t))
        return cond.to(x_t.dtype).reshape(-1, 1, 1).expand_as(x_t)

    x_t, cond = torch.randn(3, 2, 4), torch.tensor([1, 2, 3])
    plain = guided_teacher(velocity, cond, torch.zeros_like(cond), 1.0)(x_t, torch.ones(3))
    guided = guided_teacher(velocity, cond, torch.zeros_like(cond), 2.0)(x_t, torch.ones(3))
    assert calls == [3, 6]
    torch.testing.assert_close(guided, 2 * plain)


def test_scale_per_sample_and_zero_direction() -> None:
    positive, negative = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    bias = guidance_bias(positive, negative, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(bias, torch.stack([torch.zeros(3, 4), 2 * (positive - negative)[1]]))
    assert guidance_bias(torch.zeros(2, 3, 4), negative, 2.0, orthogonal=1.0).isfinite().all()


def test_full_orthogonal_guidance_is_orthogonal() -> None:
    positive, negative = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    bias = guidance_bias(positive, negative, 4.0, orthogonal=1.0)
    torch.testing.assert_close((bias * positive).flatten(1).sum(1), torch.zeros(2), rtol=0, atol=1e-4)


def test_errors_name_the_argument() -> None:
    x_t, sigma = torch.randn(2, 3, 4), torch.ones(2)
    with pytest.raises(ValueError, match="interval: expected \\(lowest, highest\\)"):
        guided_velocity(x_t, x_t, 2.0, x_t, sigma, interval=(0.6, 0.3))
    with pytest.raises(ValueError, match="null_cond: expected the shape of cond"):
        guided_teacher(lambda x_t, sigma, cond: x_t, torch.zeros(3), torch.zeros(2), 2.0)


ONE_CHANNEL = "expected a tensor of shape \\(2, 3, 4\\), got \\(2, 1, 4\\)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, sigma: guidance_bias(x, x[:, :1], 2.0), f"negative: {ONE_CHANNEL}"),
        (lambda x, sigma: guidance_bias(x, x, 2.0, 1.0, x[:, :1]), f"parallel_dir: {ONE_CHANNEL}"),
        (lambda x, sigma: guided_velocity(x[:, :1], x[:, :1], 2.0, x, sigma), f"positive: {ONE_CHANNEL}"),
        (lambda x, sigma: velocity_from_x_0(x[:, :1], x, sigma), f"x_0: {ONE_CHANNEL}"),
        (
            lambda x, sigma: guided_teacher(lambda x_t, s, c: x_t[:, :1], sigma, sigma, 1.0)(x, sigma),
            f"velocity: {ONE_CHANNEL}",
        ),
        (
            lambda x, sigma: guided_teacher(lambda x_t, s, c: x_t[:2], sigma, sigma, 2.0)(x, sigma),
            "velocity: expected a tensor of shape \\(4, 3, 4\\), got \\(2, 3, 4\\)",
        ),
        (
            lambda x, sigma: flow_matching_loss(lambda x_t, s: x_t, x, NoiseSchedule(), noise=x[:, :1]),
            f"noise: {ONE_CHANNEL}",
        ),
        (
            lambda x, sigma: flow_matching_loss(lambda x_t, s: x_t[:, :1], x, NoiseSchedule()),
            f"velocity: {ONE_CHANNEL}",
        ),
        (
            lambda x, sigma: flow_matching_loss(lambda x_t, s: (x_t,), x, NoiseSchedule()),
            "velocity: expected a tensor of shape \\(2, 3, 4\\), got tuple",
        ),
        (
            lambda x, sigma: flow_matching_loss(lambda x_t, s: x_t, x, NoiseSchedule(), raw_t=torch.ones(1)),
            "raw_t: expected a tensor of shape \\(2,\\), got \\(1,\\)",
        ),
    ],
)
def test_wrong_shapes_are_not_broadcast(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 4), torch.ones(2))


def test_flow_matching_draws_repeat_with_their_generator() -> None:
    x_0 = torch.randn(4, 2, 5)
    losses = [
        flow_matching_loss(
            lambda x_t, sigma: x_t, x_0, NoiseSchedule(3.2), generator=torch.Generator().manual_seed(seed)
        ).loss
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
