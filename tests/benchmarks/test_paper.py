"""The paper in small: losses of the baselines in closed form, cells that are cached and resumed, verdicts, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

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
from benchmarks.paper.claims import CLAIMS, judge_all
from benchmarks.paper.measure import Protocol, packed, student_path, unpacked
from benchmarks.paper.methods import PolicyStudent, build_student
from benchmarks.paper.metrics import diversity_within_class
from benchmarks.paper.report import write_report
from benchmarks.paper.results import Results
from benchmarks.paper.runner import run_cell
from benchmarks.paper.store import Store, collect, write_json
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
    near = meanflow_loss(gaussian_mean_velocity, velocity, x_t, sigma_t, sigma_r, power=0.0, step=0.01)
    off = meanflow_loss(lambda x, t, r: gaussian_velocity(x, t), velocity, x_t, sigma_t, sigma_r, power=0.0)
    assert exact.item() < 1e-20
    assert near.item() < 1e-6
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
    kept = {"id": gm(16).id, "settings": gm(16).settings}
    earlier = {"protocol": {"id": PROTOCOL.id}, "cells": [kept, {**kept, "id": "of an older recipe"}]}
    assert collect(store, core_cells(), earlier)["cells"] == [kept]
    assert collect(store, core_cells(), {**earlier, "protocol": {"id": "other"}})["cells"] == []


def test_results_of_another_budget_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    document = collect(Store(tmp_path), []) | {"cells": [{"id": "a", "settings": gm(8).settings}]}
    text = json.dumps(document)
    file.write_text(text)
    places = ["--json", str(file), "--out", str(tmp_path / "cells"), "--docs", str(tmp_path / "docs")]
    assert main(["core", *places, "--iterations", "3"]) == 2
    assert "another budget" in capsys.readouterr().err
    assert main(["core", *places, "--samples", "40"]) == 2
    assert "--samples" in capsys.readouterr().err
    assert file.read_text() == text


def test_damaged_samples_of_the_teacher_are_drawn_again(tmp_path: Path) -> None:
    store, cell = Store(tmp_path, PROTOCOL), replace(TEACHER, budget=TINY)
    run_cell(cell, store, "python -m benchmarks.paper core")
    whole = store.reference.read_bytes()
    store.reference.write_bytes(whole[: len(whole) // 2])
    assert not store.has_reference()
    run_cell(gm(8, budget=TINY), store, "python -m benchmarks.paper core")
    assert store.reference.read_bytes() == whole


def _write_often(file: Path) -> None:
    for _ in range(200):
        write_json(file, ["whole"] * 1000)


def test_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """As a cell that outlived a killed run does beside the run that repeats it."""
    file = tmp_path / "measures.json"
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_often, [file] * 3))
    assert json.loads(file.read_text()) == ["whole"] * 1000
    assert list(tmp_path.iterdir()) == [file]


def test_a_report_without_results_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json", str(tmp_path / "none.json")]) == 1
    assert "run `python -m benchmarks.paper core` first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lack the teacher"):
        write_report({"protocol": {}, "cells": []}, tmp_path)
