import pytest
import torch

from piflow.distillation import ImitationConfig, sample_raw_times, sample_source_times
from piflow.noise_schedule import NoiseSchedule, segments
from tests.golden_vectors import Case, load_group

SAMPLES = [case for case in load_group("g02_sampler").cases if case.id.startswith("sample.")]


def schedule_of(sampler: dict[str, float]) -> NoiseSchedule:
    times = ("num_timesteps", "logit_normal_enable", "logit_normal_mean", "logit_normal_std")
    return NoiseSchedule(**{name: value for name, value in sampler.items() if name not in times})  # type: ignore[arg-type]


@pytest.mark.parametrize("case", SAMPLES, ids=lambda case: case.id)
def test_raw_times_agree_with_golden(case: Case) -> None:
    sampler, call = case.scalars["sampler"], case.scalars["kwargs"]
    logit_normal = None
    if sampler.get("logit_normal_enable"):
        logit_normal = (sampler["logit_normal_mean"], sampler["logit_normal_std"])
    raw_t_range = tuple(call.get("raw_t_range", (0.0, 1.0)))
    t = sample_raw_times(raw_t_range=raw_t_range, logit_normal=logit_normal, draw=case.inputs["draw"])
    if call.get("warp_t", True):
        t = schedule_of(sampler).sigma(t, call.get("seq_len"))
    if call.get("scale_t", True):
        t = t * sampler["num_timesteps"]
    torch.testing.assert_close(t, case.outputs["t"], rtol=2e-7, atol=0)


@pytest.mark.parametrize("case", load_group("g07_sample_t").cases, ids=lambda case: case.id)
def test_source_times_are_the_reference_bit_by_bit(case: Case) -> None:
    scalars, outputs = case.scalars, case.outputs
    config = ImitationConfig(scalars["nfe"], scalars["final_step_size_scale"])
    schedule = schedule_of(scalars["sampler"])
    source = sample_source_times(case.inputs["draw"], config, schedule, scalars.get("seq_len"))
    torch.testing.assert_close(source.raw_t, outputs["raw_t_src"], rtol=0, atol=0)
    torch.testing.assert_close(source.sigma, outputs["sigma_t_src"].flatten(), rtol=0, atol=0)
    torch.testing.assert_close(source.segment_size, outputs["segment_size"], rtol=0, atol=0)
    torch.testing.assert_close(source.sigma * 1000, outputs["t_src"], rtol=0, atol=0)


def test_segments_are_drawn_by_their_length() -> None:
    config = ImitationConfig(3, final_step_size_scale=0.5)
    source = sample_source_times(20_000, config, NoiseSchedule(3.2), generator=torch.Generator().manual_seed(0))
    for raw_t, size in segments(3, 0.5):
        here = (source.raw_t - raw_t).abs() < 1e-6
        assert here.float().mean().item() == pytest.approx(size, abs=0.015)
        torch.testing.assert_close(source.segment_size[here], torch.full((int(here.sum()),), size))


def test_draws_repeat_with_their_generator() -> None:
    config, schedule = ImitationConfig(4), NoiseSchedule()
    first, second = (
        sample_source_times(16, config, schedule, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first.raw_t, second.raw_t)
    times = [sample_raw_times(16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(times[0], times[1])
    assert not torch.equal(times[0], times[2])
    assert ((times[0] > 0) & (times[0] <= 1)).all()  # raw time 0 is data: no velocity is asked there


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        sample_raw_times(0)
    with pytest.raises(ValueError, match="raw_t_range: a logit-normal time"):
        sample_raw_times(4, raw_t_range=(0.5, 1.0), logit_normal=(0.0, 1.0))
