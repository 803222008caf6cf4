"""FusedPiflowScheduler against the diffusers class whose place it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PiflowScheduler
from torch import Tensor

from piflow.schedulers import FusedPiflowScheduler


def both(**config: Any) -> tuple[PiflowScheduler, FusedPiflowScheduler]:
    theirs = PiflowScheduler(**config)
    return theirs, FusedPiflowScheduler.from_config(theirs.config)


def network(sample: Tensor, timestep: Tensor, n_grid: int) -> Tensor:
    """Some function of the state, so that errors would grow from step to step."""
    phase = torch.arange(n_grid * sample.shape[-1]) / 7
    return torch.sin(sample.repeat_interleave(n_grid, dim=-1) + phase + timestep / 1000)


def run(scheduler: PiflowScheduler, nfe: int, sample: Tensor, n_grid: int, dtype: torch.dtype) -> list[Tensor]:
    scheduler.set_timesteps(nfe)
    states = []
    for timestep in scheduler.timesteps:
        output = network(sample.float(), timestep, n_grid).to(dtype)
        sample = scheduler.step(output, timestep, sample).prev_sample
        states.append(sample)
    return states


@pytest.mark.parametrize("nfe", [1, 2, 4, 7, 50])
@pytest.mark.parametrize("substeps", [1, 3, 128, 1000])
def test_same_states(nfe: int, substeps: int) -> None:
    theirs, ours = both(num_policy_substeps=substeps)
    sample = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    for a, b in zip(
        run(ours, nfe, sample, 10, torch.float32), run(theirs, nfe, sample, 10, torch.float32), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("shape", [(2, 6, 4), (1, 3, 5, 4), (1, 2, 3, 4, 5), (3, 4)])
@pytest.mark.parametrize("n_grid", [2, 5])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_same_states_for_any_shape(shape: tuple[int, ...], n_grid: int, shift: float) -> None:
    theirs, ours = both(n_grid=n_grid, shift=shift, final_step_size_scale=1.0, num_policy_substeps=16)
    sample = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    expected = run(theirs, 3, sample, n_grid, torch.float32)
    for a, b in zip(run(ours, 3, sample, n_grid, torch.float32), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_dtypes(dtype: torch.dtype) -> None:
    """The state comes back in its own dtype; half-precision results may differ by one rounding."""
    theirs, ours = both()
    sample = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for a, b in zip(run(ours, 2, sample, 10, dtype), run(theirs, 2, sample, 10, dtype), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_same_step_index_rules() -> None:
    theirs, ours = both(num_policy_substeps=8)
    sample = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
    output = network(sample, torch.tensor(0.0), 10)
    for start in (theirs.timesteps[2], theirs.timesteps[2].clone(), float(theirs.timesteps[2])):
        results = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(4)
            at = scheduler.timesteps[2] if start is theirs.timesteps[2] else start
            results.append(scheduler.step(output, at, sample, return_dict=False)[0])
            assert scheduler.step_index == 3
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    ours.set_timesteps(4)
    assert ours.step(output, ours.timesteps[2], sample).prev_sample.shape == sample.shape  # by where it lies
    assert ours.step_index == 3
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(1)
        scheduler.step(output, scheduler.timesteps[3], sample)
        assert scheduler.step_index == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s, x: s.set_timesteps(0), ValueError),
        (lambda s, x: s.set_timesteps(2, mu=1.0), ValueError),
        (lambda s, x: s.step(torch.zeros(1, 4, 20), 3, x), ValueError),
        (lambda s, x: s.step(torch.zeros(1, 4, 20), 123.25, x), ValueError),
        (lambda s, x: s.step(torch.zeros(1, 4, 19), s.timesteps[0], x), ValueError),
        (lambda s, x: s.step(torch.zeros(1, 4, 30), s.timesteps[0], x), ValueError),
        (lambda s, x: [s.step(torch.zeros(1, 4, 20), t, x) for t in (*s.timesteps, s.timesteps[0])], RuntimeError),
    ],
)
def test_same_errors(call: Any, error: type[Exception]) -> None:
    messages = []
    for scheduler in both():
        scheduler.set_timesteps(2)
        with pytest.raises(error) as raised:
            call(scheduler, torch.zeros(1, 4, 2))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_config_round_trip(tmp_path: Any) -> None:
    ours = FusedPiflowScheduler(shift=3.0, n_grid=4)
    ours.save_pretrained(tmp_path)
    again = FusedPiflowScheduler.from_pretrained(tmp_path)
    assert (again.config.shift, again.n_grid) == (3.0, 4)


@pytest.mark.parametrize("which", ["model_output", "sample"])
def test_same_gradients(which: str) -> None:
    """Where a caller differentiates through a step, as diffusers allows."""
    g = torch.Generator().manual_seed(0)
    tensors = {"model_output": torch.randn(2, 6, 40, generator=g), "sample": torch.randn(2, 6, 4, generator=g)}
    tensors[which].requires_grad_()
    gradients = []
    for scheduler in both(num_policy_substeps=16):
        scheduler.set_timesteps(2)
        state = scheduler.step(tensors["model_output"], scheduler.timesteps[0], tensors["sample"]).prev_sample
        gradients.append(torch.autograd.grad(state.square().sum(), tensors[which])[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()
