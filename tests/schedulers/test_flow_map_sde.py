import subprocess
import sys
from pathlib import Path

import pytest
import torch

from piflow.schedulers import FlowMapSDEScheduler
from tests.golden_vectors import Case, load_group

GROUP = load_group("g06_flow_map_sde")
RUNS = [case for case in GROUP.cases if "init" in case.scalars]
STEPS = [case for case in RUNS if "prev_0" in case.outputs]


def scheduler_of(case: Case) -> FlowMapSDEScheduler:
    scheduler = FlowMapSDEScheduler(**case.scalars["init"])
    scheduler.set_timesteps(**case.scalars["set_timesteps"], device="cpu")
    return scheduler


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.id)
def test_levels_agree_with_golden(case: Case) -> None:
    """Bit by bit, but for levels above 1, which are rounding errors of the reference and 1 here."""
    scheduler = scheduler_of(case)
    steps = case.scalars["init"]["num_train_timesteps"]
    sound = case.outputs["sigmas"][:-1] <= 1
    assert scheduler.noise_schedule.shift_for(scheduler.seq_len) == case.scalars["shift_used"]
    torch.testing.assert_close(scheduler.sigmas, case.outputs["sigmas"].clamp(max=1), rtol=0, atol=0)
    torch.testing.assert_close(scheduler.timesteps, case.outputs["timesteps"].clamp(max=steps), rtol=0, atol=0)
    torch.testing.assert_close(scheduler.timesteps_dst[sound], case.outputs["timesteps_dst"][sound], rtol=0, atol=0)
    torch.testing.assert_close(scheduler.m_vals[sound], case.outputs["m_vals"][sound], rtol=0, atol=0)
    raw_src, raw_dst = scheduler.raw_t(scheduler.timesteps), scheduler.raw_t(scheduler.timesteps_dst)
    torch.testing.assert_close(raw_src[sound], case.outputs["raw_src"][sound], rtol=0, atol=0)
    torch.testing.assert_close(raw_dst[sound], case.outputs["raw_dst"][sound], rtol=0, atol=0)
    if case.scalars["init"].get("h", 0) and not sound.all():
        assert scheduler.m_vals[~sound].tolist() == [0]  # a state of pure noise keeps none of it


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
def test_step_agrees_with_golden(case: Case) -> None:
    scheduler = scheduler_of(case)
    generator = torch.Generator().manual_seed(case.scalars["seed"])
    x_dst, sample = case.inputs["x_t_dst"], case.inputs["sample"]
    for i, timestep in enumerate(scheduler.timesteps):
        prev = scheduler.step(x_dst, timestep, sample, generator=generator).prev_sample
        expected = case.outputs[f"prev_{i}"]
        assert prev.dtype == expected.dtype
        torch.testing.assert_close(prev, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["init.h0.0", "init.h1.0"])
def test_training_levels_agree_with_golden(name: str) -> None:
    case = GROUP[name]
    scheduler = FlowMapSDEScheduler(8, shift=3.2, h=case.scalars["h"])
    torch.testing.assert_close(scheduler.sigmas, case.outputs["sigmas"], rtol=0, atol=0)
    torch.testing.assert_close(scheduler.timesteps, case.outputs["timesteps"], rtol=0, atol=0)
    assert len(scheduler) == 8


def test_config_round_trips(tmp_path: Path) -> None:
    config = GROUP.raw["config_json"]
    scheduler = FlowMapSDEScheduler.from_config(config)
    ours = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    private = ("_class_name", "_diffusers_version", "_use_default_values")
    assert {name: value for name, value in ours.items() if name not in private} == {
        name: value for name, value in config.items() if name not in private
    }
    scheduler.save_pretrained(tmp_path)
    again = FlowMapSDEScheduler.from_pretrained(tmp_path)
    assert {**again.config} == {**scheduler.config}


@pytest.mark.parametrize("h", ["inf", float("inf")])
def test_infinite_h_round_trips_as_a_string(tmp_path: Path, h: float | str) -> None:
    FlowMapSDEScheduler(h=h).save_pretrained(tmp_path)
    assert '"h": "inf"' in (tmp_path / "scheduler_config.json").read_text()
    assert FlowMapSDEScheduler.from_pretrained(tmp_path).h == float("inf")


@pytest.mark.parametrize("h", [0.1, 0.5, 1.0, "inf"])
def test_no_shift_makes_nan(h: float | str) -> None:
    for thousandths in range(1000, 8000, 7):
        scheduler = FlowMapSDEScheduler(shift=thousandths / 1000, h=h)
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.max() <= 1
        for levels in (scheduler.m_vals, scheduler.timesteps_dst):
            assert levels.isfinite().all()
            assert (levels >= 0).all()


def test_noise_is_drawn_where_it_is_used() -> None:
    x = torch.randn(2, 3, 4)
    for h, draws in ((0.0, 0), (0.5, 2)):
        scheduler = FlowMapSDEScheduler(h=h)
        scheduler.set_timesteps(3)
        generator, twin = (torch.Generator().manual_seed(1) for _ in range(2))
        for timestep in scheduler.timesteps:
            scheduler.step(x, timestep, x, generator=generator)
        for _ in range(draws):
            torch.randn(2, 3, 4, generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())


def test_one_generator_per_sample() -> None:
    scheduler = FlowMapSDEScheduler(h=1.0)
    x = torch.randn(1, 3, 4)
    results = []
    for batch in (1, 2):
        scheduler.set_timesteps(2)
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        pair = x.expand(batch, 3, 4)
        results.append(scheduler.step(pair, scheduler.timesteps[0], pair, generator=generators, return_dict=False)[0])
    torch.testing.assert_close(results[0][0], results[1][0])
    assert not torch.equal(results[1][0], results[1][1])


def test_begin_index_starts_part_of_the_way_down() -> None:
    scheduler = FlowMapSDEScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert scheduler.step_index is None
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[2], torch.zeros(1, 2))
    assert scheduler.begin_index == 2
    assert scheduler.step_index == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowMapSDEScheduler(h=-1.0), "h: expected a number, at least 0"),
        (lambda: FlowMapSDEScheduler(h=None), "h: expected a number, at least 0 .* got None"),  # type: ignore[arg-type]
        (lambda: FlowMapSDEScheduler(h="x"), "h: expected a number, at least 0 .* got 'x'"),
        (lambda: FlowMapSDEScheduler(h=float("nan")), "h: expected a number"),
        (lambda: FlowMapSDEScheduler(min_raw_t=0.9, max_raw_t=0.1), "min_raw_t, max_raw_t: expected"),
        (lambda: FlowMapSDEScheduler(shift=-1.0), "shift: expected a positive"),
        (lambda: FlowMapSDEScheduler().set_timesteps(), "give num_inference_steps"),
        (lambda: FlowMapSDEScheduler().set_timesteps(0), "nfe: expected"),
        (lambda: FlowMapSDEScheduler().set_timesteps(3, sigmas=[1.0, 0.5]), "sigmas: expected one level per step, 3"),
        (
            lambda: FlowMapSDEScheduler().set_timesteps(sigmas=[1.0, 0.0]),
            r"sigmas: expected falling .* got \[1.0, 0.0\]",
        ),
        (lambda: FlowMapSDEScheduler().set_timesteps(sigmas=[0.5, 0.5]), "sigmas: expected falling levels"),
        (lambda: FlowMapSDEScheduler().step(torch.zeros(1), 1.0, torch.zeros(1)), "call set_timesteps first"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_step_errors_name_the_argument() -> None:
    scheduler = FlowMapSDEScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"timestep: 12\.0 is none of the scheduler's"):
        scheduler.step(x, 12.0, x)
    with pytest.raises(ValueError, match="model_output: expected the state at timesteps_dst"):
        scheduler.step(x[:, :1], scheduler.timesteps[0], x)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="all 2 steps are taken"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_without_diffusers_the_class_names_the_extra() -> None:
    code = """
import sys
sys.modules["diffusers"] = None
import piflow.schedulers
try:
    piflow.schedulers.FlowMapSDEScheduler
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "FlowMapSDEScheduler needs diffusers: pip install 'piflow[diffusers]'"
