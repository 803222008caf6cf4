"""The paper in small: losses of the baselines in closed form, cells that are cached and resumed, verdicts, report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.paper.__main__ import main
from benchmarks.paper.baselines import (
    MeanFlowDiT,
    draw_interval,
    euler_mean_velocity,
    jump,
    meanflow_loss,
    shortcut_loss,
)
from benchmarks.paper.cells import (
    CORE,
    TEACHER,
    Budget,
    Cell,
    core_cells,
    dx,
    full_cells,
    gm,
    meanflow,
    read_cell,
    shortcut,
)
from benchmarks.paper.claims import CLAIMS, Contrast, Side, judge, judge_all
from benchmarks.paper.explanations import EXPLANATIONS
from benchmarks.paper.measure import Protocol, packed, student_path, unpacked
from benchmarks.paper.methods import PolicyStudent, build_student
from benchmarks.paper.metrics import diversity_within_class
from benchmarks.paper.report import write_report
from benchmarks.paper.results import Results, shown
from benchmarks.paper.runner import run_cell
from benchmarks.paper.store import Store, collect
from benchmarks.paper.train import curve, train
from piflow.digits.teacher import load_teacher, network_velocity
from piflow.distillation import imitation_trajectory
from tests.processes import time_limit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = Budget(iterations=2, batch_size=8)
PROTOCOL = Protocol(
    num_samples=40, reference_steps=4, during_training=20, teacher_steps=(1, 2), substeps=(4, 8),
    temperatures=(0.3, 1.0), elastic_nfes=(4, 8), trajectories=1,
)  # fmt: skip


def gaussian_velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
    """Of x_0 and noise both standard normal: x_t has variance s^2 = (1 - sigma)^2 + sigma^2, and u = x_t s' / s."""
    level = sigma.reshape(-1, *[1] * (x_t.dim() - 1))
    return x_t * (2 * level - 1) / ((1 - level) ** 2 + level**2)


def gaussian_mean_velocity(x_t: Tensor, sigma_t: Tensor, sigma_r: Tensor) -> Tensor:
    """(x_t - x_r) / (t - r) on the exact flow x_r = x_t s(r) / s(t); the velocity where r = t."""
    t, r = (sigma.reshape(-1, *[1] * (x_t.dim() - 1)) for sigma in (sigma_t, sigma_r))
    s_t, s_r = (((1 - level) ** 2 + level**2).sqrt() for level in (t, r))
    gap = torch.where(t > r, t - r, torch.ones_like(t))
    return torch.where(t > r, x_t * (1 - s_r / s_t) / gap, gaussian_velocity(x_t, sigma_t))


def test_the_meanflow_loss_is_zero_at_the_exact_mean_velocity_only() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma_t, sigma_r = (v.double() for v in draw_interval(64, 0.5, generator))
    x_t = torch.randn(64, 2, 3, generator=generator, dtype=torch.float64)
    velocity = gaussian_velocity(x_t, sigma_t)
    exact = meanflow_loss(gaussian_mean_velocity, velocity, x_t, sigma_t, sigma_r, power=0.0)
    off = meanflow_loss(lambda x, t, r: gaussian_velocity(x, t), velocity, x_t, sigma_t, sigma_r, power=0.0)
    assert exact.item() < 1e-20
    assert off.item() > 1e-3


def test_half_of_the_intervals_are_empty_and_none_is_reversed() -> None:
    sigma_t, sigma_r = draw_interval(4000, 0.5, torch.Generator().manual_seed(0))
    assert (sigma_t >= sigma_r).all()
    assert 0.45 < (sigma_t > sigma_r).double().mean() < 0.55


def test_meanflow_learns_the_flow_of_a_gaussian() -> None:
    """One jump of the network ends where the exact flow does, x_0 = x_1, which the velocity at the start misses."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def mean_velocity(x_t: Tensor, sigma_t: Tensor, sigma_r: Tensor) -> Tensor:
        inputs = torch.cat([x_t[..., 0], sigma_t[:, None], sigma_r[:, None]], dim=1)
        return network(inputs)[..., None]

    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(500):
        sigma_t, sigma_r = draw_interval(256, 0.75, generator)
        scale = ((1 - sigma_t) ** 2 + sigma_t**2).sqrt()[:, None, None]
        x_t = scale * torch.randn(256, 1, 1, generator=generator)
        loss = meanflow_loss(mean_velocity, gaussian_velocity(x_t, sigma_t), x_t, sigma_t, sigma_r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(500, 1, 1, generator=generator)
    with torch.no_grad():
        learnt, straight = jump(mean_velocity, noise, 1), jump(lambda x, t, r: gaussian_velocity(x, t), noise, 1)
    assert (learnt - noise).square().mean() < 0.02
    assert (straight - noise).square().mean() > 0.5


def test_the_shortcut_learns_where_euler_steps_of_the_teacher_end() -> None:
    """Of u = c x the product of 1 + c ds is known."""
    x, c = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0)), 0.7
    sigma_src, sigma_dst = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.0, 0.2, 0.25])
    velocity = euler_mean_velocity(lambda x_t, sigma: c * x_t, x, sigma_src, sigma_dst, 4)
    length = (sigma_dst - sigma_src)[:, None, None]
    expected = ((1 + c * length / 4) ** 4 - 1) * x / length
    torch.testing.assert_close(velocity, expected)
    predicted = expected + 0.2
    assert shortcut_loss(predicted, velocity).item() == pytest.approx(0.02, rel=1e-5)


def test_jumps_cover_the_whole_of_time() -> None:
    """A constant mean velocity carries the noise by exactly 1, in any number of jumps."""
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[float] = []

    def constant(x_t: Tensor, sigma_t: Tensor, sigma_r: Tensor) -> Tensor:
        seen.extend([sigma_t[0].item(), sigma_r[0].item()])
        return torch.ones_like(x_t)

    torch.testing.assert_close(jump(constant, noise, 4), noise - 1)
    assert seen == pytest.approx([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0])


def test_meanflow_starts_as_the_teacher_and_hears_the_second_level() -> None:
    teacher, labels = load_teacher(), torch.tensor([3, 7])
    network = MeanFlowDiT(teacher).eval()
    x, t, r = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0.1, 0.4])
    torch.testing.assert_close(network(x, t, r, labels), network_velocity(teacher, labels)(x, t))
    nn.init.normal_(network.length[-1].weight)
    assert not torch.allclose(network(x, t, r, labels)[0], network(x, t, t, labels)[0], atol=1e-3)
    torch.testing.assert_close(network(x, t, r, labels)[1], network(x, t, t, labels)[1])


def test_ids_and_names_tell_cells_apart() -> None:
    cells = full_cells()
    assert len({cell.id for cell in cells}) == len({cell.name for cell in cells}) == len(cells)
    assert all(read_cell(json.loads(json.dumps(cell.settings))) == cell for cell in cells)
    assert cells[: len(core_cells())] == core_cells()
    assert len(CORE) + 1 <= 12  # the checkerboard's student is the other training


def test_a_data_free_cell_is_the_walk_of_the_library() -> None:
    cell = gm(8, 4, data_free=True, budget=TINY)
    student = build_student(cell)
    assert isinstance(student, PolicyStudent)
    labels = torch.arange(8)
    loss = student.loss(torch.zeros(8, 1, 8, 8), labels, 0, torch.Generator().manual_seed(1))
    module, generator = student.module, torch.Generator().manual_seed(1)
    condition, null = {"class_labels": labels[:2]}, {"class_labels": torch.full((2,), 10)}
    walk = imitation_trajectory(
        lambda x_src, source: module.policy(x_src, source, condition, (8, 8)),
        module.teacher_velocity(condition, null, (8, 8)),
        torch.randn(2, 1, 8, 8, generator=generator),
        module.schedule,
        module.imitation,
        generator=generator,
    )
    expected = torch.stack([weight * result.loss for weight, result in walk]).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("cell", [gm(8), dx(5, 2), shortcut(2), meanflow()], ids=lambda c: c.label)
def test_every_method_trains_and_repeats(cell: Cell) -> None:
    cell = replace(cell, budget=Budget(iterations=4, batch_size=8, learning_rate=1e-3))
    stops: list[int] = []
    first, second = (train(cell, 2, lambda iteration, student: stops.append(iteration)) for _ in range(2))
    assert first.losses == second.losses
    assert stops == [2, 4, 2, 4]
    start = build_student(cell).network.state_dict()
    moved = [not torch.equal(value, start[name]) for name, value in first.student.network.state_dict().items()]
    assert sum(moved) > len(moved) / 2
    assert len(set(first.losses)) == 4


def test_the_path_of_a_student_ends_at_its_sample() -> None:
    student = build_student(gm(8, 2, budget=TINY))
    assert isinstance(student, PolicyStudent)
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        path = student_path(student, noise, labels, 2)
    assert path.shape == (2, 129, 1, 8, 8)
    torch.testing.assert_close(path[:, -1], student.sample(noise, labels, 2))


def test_loss_curves_are_means_of_stretches() -> None:
    assert curve([1.0, 3.0, 5.0, 7.0, 9.0], points=3) == [(2, 2.0), (4, 6.0), (5, 9.0)]


def test_diversity_is_the_mean_distance_within_a_class() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [1.0, 2.0], [1.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert diversity_within_class(features, labels) == pytest.approx((5 + (2 + 2 + 4) / 3) / 2)
    with pytest.raises(ValueError, match="at least two samples"):
        diversity_within_class(features[:3], labels[:3])


def test_pictures_survive_their_packing() -> None:
    x_0 = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (unpacked(packed(x_0)) - x_0[:, 0]).abs().max() <= 1 / 255 + 1e-6


def test_a_cell_is_trained_once_and_measured_again_for_another_protocol(tmp_path: Path) -> None:
    cell, store = gm(8, 4, budget=TINY), Store(tmp_path, PROTOCOL)
    for each in (replace(TEACHER, budget=TINY), cell):
        run_cell(each, store, "python -m benchmarks.paper core")
        assert store.is_done(each)
    result = store.result(cell)
    assert set(result["studies"]) == {"substeps", "temperature", "elastic"}
    assert [row["nfe"] for row in result["studies"]["elastic"]] == [4, 8]
    assert result["measures"]["4"]["frechet_to_teacher"] > 0
    assert len(result["convergence"]) == 2
    written = store.weights_file(cell).stat().st_mtime_ns

    other = Store(tmp_path, replace(PROTOCOL, temperatures=(0.5,)))
    assert not other.is_done(cell)
    run_cell(cell, other, "python -m benchmarks.paper core")
    assert other.is_done(cell)
    assert store.weights_file(cell).stat().st_mtime_ns == written  # not trained again

    store.weights_file(cell).write_bytes(b"half")  # as after a full disk
    run_cell(cell, other, "python -m benchmarks.paper core")
    assert build_student(cell).network is not None
    assert store.load_weights(cell, build_student(cell).network)


KILLED = ("teacher", "MeanFlow", "shortcut, 1 NFE", "DX N=10, 4 NFE")


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL after the first cells; the second run keeps them and does the rest."""
    folder, small = tmp_path / "cells", ["--iterations", "2", "--batch-size", "8", "--samples", "40"]
    places = ["--out", str(folder), "--json", str(tmp_path / "p.json"), "--docs", str(tmp_path / "docs")]
    words = ["core", *small, *places, "--only", "MeanFlow", "shortcut", "DX N=10, 4"]
    cells = [cell for cell in core_cells(Budget(2, 8)) if cell.label in KILLED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    store = Store(folder, Protocol(num_samples=40))
    with time_limit(500):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paper", *words], cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while sum(map(store.is_done, cells)) < 2 and process.poll() is None:
                time.sleep(0.2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done = {cell.id: (store.at(cell) / "measures.json").stat().st_mtime_ns for cell in cells if store.is_done(cell)}
        assert 2 <= len(done) < len(cells)
        (folder / cells[-1].id).mkdir(exist_ok=True)
        (folder / cells[-1].id / "measures.json").write_text('{"protocol": "')  # half-written
        assert main(words) == 0
    assert all(map(store.is_done, cells))
    assert done.items() <= {c.id: (store.at(c) / "measures.json").stat().st_mtime_ns for c in cells}.items()

    document = json.loads((tmp_path / "p.json").read_text())
    assert {result["id"] for result in document["cells"]} == {cell.id for cell in cells}
    assert {result["command"] for result in document["cells"]} == {
        "python -m benchmarks.paper core --iterations 2 --batch-size 8 --samples 40"
    }
    assert all(result["machine"]["torch"] == torch.__version__ for result in document["cells"])
    text = (tmp_path / "docs" / "paper.md").read_text()
    assert all(claim.statement in text for claim in CLAIMS)
    assert str(tmp_path) not in text
    assert "Not run yet" in text


def made_up(values: dict[Cell, list[float]], teacher: dict[int, float] | None = None) -> Results:
    """Results in which each cell has these Fréchet distances, one per seed, at its own number of steps."""
    rows: list[dict[str, Any]] = []
    for cell, per_seed in values.items():
        for seed, value in enumerate(per_seed):
            measures = {str(nfe): {"frechet_to_teacher": value, "diversity": value} for nfe in cell.sampled_nfes}
            rows.append({"id": f"{cell.id}{seed}", "settings": replace(cell, seed=seed).settings, "measures": measures})
    measures = {str(n): {"frechet_to_teacher": value} for n, value in (teacher or {}).items()}
    rows.append({"id": "t", "settings": TEACHER.settings, "measures": measures})
    return Results({"protocol": {}, "cells": rows})


def verdict_of(claim_id: str, results: Results) -> str:
    return judge(next(claim for claim in CLAIMS if claim.id == claim_id), results).verdict


def test_verdicts_follow_the_numbers() -> None:
    gms, dxs = [1.0, 1.1, 0.9], [2.0, 2.1, 1.9]
    assert verdict_of("gm_over_dx", made_up({gm(8): gms, dx(10): dxs})) == "holds"
    assert verdict_of("gm_over_dx", made_up({gm(8): dxs, dx(10): gms})) == "does not hold"
    assert verdict_of("gm_over_dx", made_up({gm(8): gms, dx(10): [1.05, 0.95, 1.0]})) == "not decided"
    assert verdict_of("gm_over_dx", made_up({gm(8): gms})) == "not decided"


def test_one_contrary_comparison_is_enough() -> None:
    values = {gm(1): [4.0, 4.1], gm(8): [2.0, 2.1], gm(32): [3.0, 3.1]}
    judgement = judge(next(claim for claim in CLAIMS if claim.id == "components"), made_up(values))
    assert [verdict for _, verdict in judgement.contrasts] == ["does not hold", "holds"]
    assert judgement.verdict == "does not hold"


def test_single_seeds_need_a_large_difference() -> None:
    assert verdict_of("gm_over_dx", made_up({gm(8): [1.0], dx(10): [1.5]})) == "not decided"
    assert verdict_of("gm_over_dx", made_up({gm(8): [1.0], dx(10): [1.8]})) == "holds"


def test_the_spread_is_pooled_over_repeated_cells() -> None:
    results = made_up({gm(8): [1.0, math.e], dx(10): [2.0, 2.0], gm(1): [5.0]})
    assert results.spread("frechet_to_teacher") == pytest.approx(0.5)  # (0.5^2 + 0.5^2 + 0 + 0) / 2


def test_a_student_is_compared_with_the_teacher() -> None:
    teacher = {4: 3.0, 8: 1.0}
    students = {gm(8): [2.0, 2.1], gm(8, 2): [0.5, 0.55], gm(8, 4): [0.3, 0.33]}
    assert verdict_of("few_steps", made_up(students, teacher)) == "holds"
    assert verdict_of("few_steps", made_up(students, {4: 1.0, 8: 1.0})) == "does not hold"


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [([0.98, 1.02], "holds"), ([0.7, 0.71], "does not hold"), ([0.8, 1.08], "not decided")],
)
def test_diversity_is_near_the_teachers(ratios: list[float], verdict: str) -> None:
    assert verdict_of("diversity", made_up({gm(8): ratios})) == verdict


def test_not_above_allows_its_tolerance() -> None:
    results = made_up({gm(8): [1.0, 1.02, 0.98]})
    base = Side("b", [1.0, 1.0, 1.0])
    verdicts = [Contrast(Side("a", [v] * 3), "not above", base).verdict(results) for v in (0.5, 1.2, 1.4)]
    assert verdicts == ["holds", "holds", "does not hold"]


def test_numbers_are_shown_with_spread_and_count() -> None:
    assert shown([1.0, 2.0, 3.0]) == "2.00 ± 1.0 (n=3)"
    assert shown([0.0123]) == "0.0123 (n=1)"
    assert shown([]) == "-"


def test_explanations_belong_to_claims() -> None:
    assert {claim for claim, _ in EXPLANATIONS} <= {claim.id for claim in CLAIMS}
    assert {verdict for _, verdict in EXPLANATIONS} <= {"holds", "does not hold", "not decided"}


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "paper.json").read_text())
    write_report(document, tmp_path)
    text = (tmp_path / "paper.md").read_text()
    assert text == (ROOT / "docs" / "paper.md").read_text()
    for picture in ("quality", "samples", "convergence", "trajectories", "studies", "toy", "checkerboard"):
        file = Path("images") / f"paper_{picture}.png"
        assert str(file) in text
        assert 1000 < (tmp_path / file).stat().st_size < 200_000
        assert 1000 < (ROOT / "docs" / file).stat().st_size < 200_000
    assert len(judge_all(Results(document))) == len(CLAIMS)


def test_results_of_another_folder_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, PROTOCOL)
    earlier = {"protocol": {"id": PROTOCOL.id}, "cells": [{"id": "elsewhere"}]}
    assert collect(store, core_cells(), earlier)["cells"] == [{"id": "elsewhere"}]
    assert collect(store, core_cells(), {**earlier, "protocol": {"id": "other"}})["cells"] == []


def test_a_report_without_results_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json", str(tmp_path / "none.json")]) == 1
    assert "run `python -m benchmarks.paper core` first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lack the teacher"):
        write_report({"protocol": {}, "cells": []}, tmp_path)
