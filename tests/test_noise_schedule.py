import math

import pytest
import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule, segments
from tests.golden_vectors import Case, load_group

WARPS = [case for case in load_group("g02_sampler").cases if "raw_t" in case.inputs]

FALLING = NoiseSchedule(use_dynamic_shifting=True, base_logshift=2.0, max_logshift=0.1, dynamic_shifting_type="sqrt")


def schedule_of(case: Case) -> NoiseSchedule:
    sampler = {name: value for name, value in case.scalars["sampler"].items() if name != "num_timesteps"}
    return NoiseSchedule(**sampler)


@pytest.mark.parametrize("case", WARPS, ids=lambda case: case.id)
def test_warp_is_the_reference_bit_by_bit(case: Case) -> None:
    schedule, seq_len = schedule_of(case), case.scalars["seq_len"]
    raw_t: Tensor = case.inputs["raw_t"]
    assert schedule.shift_for(seq_len) == case.scalars["shift_used"]
    torch.testing.assert_close(schedule.sigma(raw_t, seq_len), case.outputs["sigma"], rtol=0, atol=0)
    torch.testing.assert_close(schedule.sigma(raw_t.double(), seq_len), case.outputs["sigma64"], rtol=0, atol=0)
    raw_back = schedule.raw_t(case.outputs["sigma"], seq_len)
    torch.testing.assert_close(raw_back, case.outputs["raw_back"], rtol=0, atol=0)


@pytest.mark.parametrize("case", load_group("g02_gmflow_integrate_P").cases, ids=lambda case: case.id)
def test_substeps_are_the_reference_bit_by_bit(case: Case) -> None:
    schedule, seq_len = schedule_of(case), case.scalars["seq_len"]
    dtype = {"f32": torch.float32, "f64": torch.float64}[case.raw["dtype"]]
    start, end = (case.inputs[name].to(dtype) for name in ("raw_t_start", "raw_t_end"))
    sigmas = schedule.substep_sigmas(start, end, case.scalars["total_substeps"], seq_len)
    assert sigmas.dtype == dtype
    assert sigmas.shape == (3, max(case.scalars["num_substeps"]) + 1)
    torch.testing.assert_close(sigmas[:, 0], case.outputs["sigma_t_start"].flatten(), rtol=0, atol=0)
    torch.testing.assert_close(sigmas[:, -1], case.outputs["sigma_t_end"].flatten(), rtol=0, atol=0)
    for levels, count in zip(sigmas, case.scalars["num_substeps"]):
        assert (levels[count:] == levels[count]).all()


@pytest.mark.parametrize("dynamic", ["exp", "sqrt"])
def test_float_and_tensor_times_agree_and_invert(dynamic: str) -> None:
    schedule = NoiseSchedule(3.2, use_dynamic_shifting=True, dynamic_shifting_type=dynamic)  # type: ignore[arg-type]
    for seq_len in (None, 256, 1024, 4096, 6000):
        raw_t = torch.linspace(0, 1, 9, dtype=torch.float64)
        sigma = schedule.sigma(raw_t, seq_len)
        torch.testing.assert_close(schedule.raw_t(sigma, seq_len), raw_t, rtol=1e-12, atol=1e-14)
        assert schedule.sigma(0.25, seq_len) == sigma[2]
    assert schedule.shift_for(256) == pytest.approx(math.exp(0.5))
    assert schedule.shift_for(4096) == pytest.approx(math.exp(1.15))
    assert schedule.shift_for(None) == 3.2


def test_substep_counts_are_per_sample() -> None:
    start, end = torch.tensor([1.0, 1.0, 0.5, 0.25]), torch.tensor([0.75, 1.0, 0.49, -0.1])
    sigmas = NoiseSchedule().substep_sigmas(start, end, 16)
    steps = (sigmas.diff(dim=1) != 0).sum(1)
    assert sigmas.shape == (4, 7)
    assert steps.tolist() == [4, 0, 1, 5]  # the last one's sixth step is at 0 already
    torch.testing.assert_close(sigmas[:, -1], end.clamp(min=0))
    assert (sigmas.diff(dim=1) <= 0).all()


def test_max_substeps_only_pads() -> None:
    start, end = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.4])
    tight = NoiseSchedule(3.2).substep_sigmas(start, end, 16)
    wide = NoiseSchedule(3.2).substep_sigmas(start, end, 16, max_substeps=12)
    assert wide.shape == (2, 13)
    torch.testing.assert_close(wide[:, : tight.shape[1]], tight, rtol=0, atol=0)
    assert (wide[:, tight.shape[1] :] == tight[:, -1:]).all()


def test_an_empty_batch_has_no_levels() -> None:
    assert NoiseSchedule(3.2).substep_sigmas(torch.ones(0), torch.zeros(0), 16).shape == (0, 2)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 8, 17])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, 2.0])
def test_segments_tile_raw_time(nfe: int, scale: float) -> None:
    starts, sizes = zip(*segments(nfe, scale))
    assert len(starts) == nfe
    assert starts[0] == 1
    assert sum(sizes) == pytest.approx(1, abs=1e-12)
    for i in range(nfe - 1):
        assert starts[i] - sizes[i] == pytest.approx(starts[i + 1], abs=1e-12)
    assert starts[-1] - sizes[-1] == pytest.approx(0, abs=1e-12)
    if nfe > 1:
        assert sizes[-1] / sizes[0] == pytest.approx(max(scale, 1e-4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseSchedule(shift=0), "shift: expected a positive"),
        (lambda: NoiseSchedule(dynamic_shifting_type="log"), "dynamic_shifting_type: expected 'exp' or 'sqrt'"),  # type: ignore[arg-type]
        (lambda: NoiseSchedule(use_dynamic_shifting=True, base_seq_len=64, max_seq_len=64), "expected 0 < base < max"),
        (lambda: NoiseSchedule(use_dynamic_shifting=True).shift_for(0), "seq_len: expected a positive"),
        (lambda: segments(0), "nfe: expected .* at least 1, got 0"),
        (lambda: segments(2.0), "nfe: expected a whole number"),  # type: ignore[arg-type]
        (lambda: segments(2, -1), "final_step_size_scale: expected"),
        (
            lambda: NoiseSchedule().substep_sigmas(torch.ones(2), torch.zeros(2), 0),
            "total_substeps: expected a whole number, at least 1, got 0",
        ),
        (
            lambda: NoiseSchedule().substep_sigmas(torch.ones(2), torch.zeros(2), "8"),  # type: ignore[arg-type]
            "total_substeps: expected a whole number, at least 1, got '8'",
        ),
        (lambda: NoiseSchedule("3"), "shift: expected a positive finite number, got '3'"),  # type: ignore[arg-type]
        (lambda: segments(2, "x"), "final_step_size_scale: expected a finite number, at least 0, got 'x'"),  # type: ignore[arg-type]
        (
            lambda: NoiseSchedule(use_dynamic_shifting=True, base_logshift=math.nan),
            "base_logshift, .* got nan and 1.15",
        ),
        (lambda: NoiseSchedule(use_dynamic_shifting=True, max_logshift=math.inf), "max_logshift: .* got 0.5 and inf"),
        (lambda: FALLING.shift_for(100_000), "seq_len: expected .* positive .* make it -.* at 100000 tokens"),
        (lambda: FALLING.sigma(0.5, 100_000), "seq_len: expected a length whose shift is positive"),
        (lambda: NoiseSchedule(use_dynamic_shifting=True).shift_for(10**8), "make it inf at 100000000 tokens"),
        (lambda: NoiseSchedule().substep_sigmas(torch.ones(2), torch.zeros(3), 4), "raw_t_start, raw_t_end: expected"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
