"""The runner, end to end at tiny sizes, and what it does with candidates that are wrong, too large or die."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.candidates import Graphed
from benchmarks.measure import Row, Settings, batch_within, checked_samples, measure_case
from benchmarks.operations import Case, Operation, cases
from benchmarks.report import markdown
from benchmarks.roofline import Rates, Work
from benchmarks.shapes import DX_SHAPES, GM_SHAPES, GMShape
from piflow_kernels import gm_rollout

ROOT = Path(__file__).parents[2]
QUICK = Settings(seconds=0.0, least_rounds=3)
SMALL = GMShape(2, 3, 4, (3, 5), 4)
RATES = Rates(bytes=1e9, multiply_adds=1e9, exponentials=1e9, probe="made up")


def reference(**problem: Any) -> Tensor:
    return gm_rollout(**problem, backend="reference")


def ours(**problem: Any) -> Tensor:
    return gm_rollout(**problem)


def slightly_wrong(**problem: Any) -> Tensor:
    return gm_rollout(**problem) * 1.001


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


def wrong_gradient(means: Tensor, **problem: Any) -> Tensor:
    return gm_rollout(means=WrongGradient.apply(means), **problem)


def too_large(**problem: Any) -> Tensor:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ...")


def not_for_this(**problem: Any) -> Tensor:
    raise ValueError("means: expected one of two components\nand a second line")


def measured(candidates: dict[str, Any], leaves: tuple[str, ...] = ()) -> dict[tuple[str, str], Row]:
    def build(batch: int) -> Operation:
        problem = dataclasses.replace(SMALL, batch=batch).problem(torch.float32)
        work = Work(bytes=1e6)
        return Operation("gm_rollout", 4, problem, {"reference": reference, **candidates}, leaves, work, work)

    told: list[str] = []
    rows = measure_case(Case("kernels", "small", 2, (build,)), QUICK, {}, told.append)
    assert told[-1] == ""  # nothing is under way
    return {(row["candidate"], row["pass"]): row for row in run.finished(rows, RATES)}


def test_a_right_candidate_has_times_memory_floor_and_speed_up() -> None:
    rows = measured({"ours": ours}, ("means", "logweights"))
    passes = ("forward, recorded", "backward", "both")
    assert set(rows) == {(name, each) for name in ("reference", "ours") for each in passes}
    row = rows["ours", "both"]
    assert row["status"] == "ok"
    assert row["rounds"] == 3
    assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
    assert rows["ours", "backward"]["ms"]["p50"] < row["ms"]["p80"]
    assert row["floor_ms"] == pytest.approx(2.0)  # 2 MB at 1 GB/s
    assert row["multiple_of_floor"] == pytest.approx(row["ms"]["p50"] / 2)
    assert row["speedup"] == pytest.approx(rows["reference", "both"]["ms"]["p50"] / row["ms"]["p50"])
    assert "speedup" not in rows["reference", "both"]
    assert row["peak_bytes"] >= 0
    assert rows["ours", "forward, recorded"]["floor_ms"] == pytest.approx(1.0)
    assert not any("forward_peak_bytes" in each for each in rows.values())
    assert row["error"] < row["bound"]
    assert row["samples_checked"] == 2


@pytest.mark.parametrize(
    ("candidate", "leaves", "result"),
    [(slightly_wrong, (), "value max"), (wrong_gradient, ("logweights", "means"), "means")],
)
def test_a_wrong_candidate_has_neither_time_nor_speed_up(candidate: Any, leaves: tuple[str, ...], result: str) -> None:
    rows = measured({"wrong one": candidate, "ours": ours}, leaves)
    for (name, _), row in rows.items():
        if name == "wrong one":
            assert row["status"] == "wrong"
            assert row["result"].startswith(result.split()[0])
            assert row["error"] > row["bound"]
            assert not {"ms", "speedup", "multiple_of_floor", "peak_bytes"} & set(row)
        else:
            assert row["status"] == "ok"
    line = next(line for line in markdown(rows.values()).splitlines() if "wrong one" in line)
    assert [cell.strip() for cell in line.split("|")][5:11] == [""] * 6
    assert line.split("|")[12].strip() == ""  # calls
    assert "**wrong**" in line


def test_a_wrong_textbook_is_no_yardstick_and_gives_no_speed_up() -> None:
    """Twice its error would let anything pass."""

    def far_off(**problem: Any) -> Tensor:
        return reference(**problem) * (1.1 if problem["x_src"].dtype == torch.float32 else 1)

    rows = measured({"reference": far_off, "ours": ours})
    assert all(row["status"] == "wrong" for row in rows.values())
    assert not any("speedup" in row for row in rows.values())


def test_what_was_stored_wrong_is_not_shown() -> None:
    """Even where a file has times for it."""
    row = {
        "suite": "kernels", "case": "a", "operation": "b", "pass": "forward", "candidate": "c", "status": "wrong",
        "ms": {"p20": 1.0, "p50": 77.0, "p80": 3.0}, "speedup": 99.0, "multiple_of_floor": 88.0, "error": 1.0,
    }  # fmt: skip
    (finished,) = run.finished([dict(row)], RATES)
    assert "ms" not in finished
    assert not any(figure in markdown([row]) for figure in ("77", "99", "88"))


def test_a_candidate_that_cannot_run_is_a_row_that_says_so() -> None:
    rows = measured({"large": too_large, "other": not_for_this, "ours": ours})
    assert rows["large", "forward"]["status"] == "out of memory"
    assert rows["other", "forward"]["status"] == "unsupported"
    assert rows["other", "forward"]["note"] == "ValueError: means: expected one of two components"
    assert rows["ours", "forward"]["status"] == "ok"


def test_a_batch_that_takes_too_long_is_cut() -> None:
    shape = dataclasses.replace(SMALL, batch=64)
    batches: list[int] = []

    def build(batch: int) -> Operation:
        batches.append(batch)
        problem = dataclasses.replace(shape, batch=batch).problem(torch.float32)
        return Operation("gm_rollout", 4, problem, {"reference": reference})

    assert batch_within(build, 64, Settings(longest=1e9)) == (64, "")
    cut, note = batch_within(build, 64, Settings(longest=1e-9))
    assert cut == 8
    assert note.startswith("8 of 64 samples: the textbook's first call of all would take")
    assert batch_within(build, 4, Settings(longest=1e-9)) == (4, "")
    assert batches == [8, 8]


def test_a_capture_that_fails_ends_the_process_with_its_reason() -> None:
    """What is measured after it would not be trusted. Here it fails for want of a GPU."""
    told: list[Any] = []
    graph = Graphed(ours, ())

    def build(batch: int) -> Operation:
        problem = SMALL.problem(torch.float32)
        return Operation("gm_rollout", 4, problem, {"reference": reference, "ours, CUDA graph": graph})

    if torch.cuda.is_available():
        return
    case = Case("kernels", "small", 2, (build,))
    with pytest.raises((RuntimeError, AssertionError)):
        measure_case(case, QUICK, {}, lambda *words: told.append(words))
    key, row = told[-1]
    assert key == "ours, CUDA graph of gm_rollout"
    assert row["status"] == "unsupported"
    rows = measure_case(case, QUICK, {key: row}, lambda *words: None)
    assert [(each["candidate"], each["status"]) for each in rows] == [
        ("reference", "ok"), ("ours, CUDA graph", "unsupported"),
    ]  # fmt: skip


def test_the_last_sample_is_checked() -> None:
    """Also where not all of a batch are."""
    shape = GMShape(5, 2, 4, (1024, 1024), 2)
    problem = {"x_src": torch.zeros(5, 4, 8), "means": torch.empty(5, 2, 4, 1024, 1024, device="meta")}
    operation = Operation("x", shape.n_steps, problem, {})
    assert checked_samples(operation).tolist() == [0]
    problem["means"] = problem["means"][..., :512]
    assert checked_samples(operation).tolist() == [0, 4]


def test_a_part_of_the_suites_does_not_replace_the_stored_results() -> None:
    def file(*words: str) -> str:
        return run.default_file(run.parsed(["--device", "cpu", *words])).as_posix()

    assert file().endswith("benchmarks/results/run_cpu.json")
    for words in (["--suite", "kernels"], ["--tiny"], ["--cases", "flux"], ["--candidates", "ours"]):
        assert file(*words).endswith("outputs/benchmarks/run_cpu.json"), words


def test_large_batches_are_what_training_is_about() -> None:
    options = run.parsed(["--device", "cpu"])
    assert run.settings_of("kernels", options).longest < run.settings_of("training", options).longest
    options = run.parsed(["--device", "cpu", "--longest", "1.5"])
    assert run.settings_of("training", options).longest == 1.5
    assert "--longest=1.5" in run.command("training", "x", options, Path("rows"), {})


def options(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**vars(run.parsed(["--device", "cpu", "--json", str(tmp_path / "x.json")])) | changes)


KILLED = """
import json, os, signal, sys
rows, skip = sys.argv[1], json.loads(sys.argv[2])
with open(rows, "a") as lines:
    for name in ("a", "b", "c"):
        if name in skip:
            lines.write(json.dumps({"candidate": name, **skip[name]}) + "\\n")
            continue
        lines.write(json.dumps({"doing": name}) + "\\n")
        lines.flush()
        if name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "c":
            lines.write(json.dumps({"doing": name, "row": {"status": "unsupported", "note": "no capture"}}) + "\\n")
            sys.exit(1)
        lines.write(json.dumps({"candidate": name, "status": "ok"}) + "\\n")
    lines.write(json.dumps({"doing": ""}) + "\\n")
"""


def test_a_candidate_that_kills_its_process_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(suite: str, name: str, options: argparse.Namespace, rows: Path, skip: dict[str, Row]) -> list[str]:
        return [sys.executable, "-c", KILLED, str(rows), json.dumps(skip)]

    monkeypatch.setattr(run, "command", command)
    rows = run.isolated("kernels", "x", options(tmp_path))
    assert [(row["candidate"], row["status"]) for row in rows] == [("a", "ok"), ("b", "died"), ("c", "unsupported")]
    assert [row.get("note") for row in rows] == [
        None,
        "its process was killed by signal 9 (out of memory?)",
        "no capture",
    ]


def test_a_process_that_dies_of_something_else_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    (row,) = run.isolated("kernels", "x", options(tmp_path))
    assert (row["status"], row["note"]) == ("died", "its process ended with 3")
    assert "its process ended with 3" in markdown([row])


@pytest.mark.slow
def test_every_suite_runs_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "run.json"
    words = ["--suite", "all", "--device", "cpu", "--tiny", "--seconds", "0.01", "--json", str(file)]
    words += ["--candidates", "ours", "diffusers", "reference, checkpointed", "--cases"]
    assert run.main([*words, "kandinsky-6-pro", "imagenet-256-batch-64", "imagenet-dit-xl"]) == 0
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["rates"]["bytes"] > 1e8
    assert content["tiny"]
    rows = content["rows"]
    assert [row for row in rows if row["status"] != "ok"] == []
    found = {(row["suite"], row["operation"], row["candidate"]) for row in rows}
    assert {
        ("kernels", "dx_rollout", "diffusers"),
        ("kernels", "dx_rollout", "ours"),
        ("policies", "PiflowScheduler.step", "ours"),
        ("training", "GMFlowPolicy.mean_velocity_loss", "reference, checkpointed"),
        ("training", "imitation_segment", "ours"),
        ("pipeline", "policies of a call", "ours"),
        ("pipeline", "network in it", "ours"),
    } <= found
    for row in rows:
        assert row["ms"]["p50"] > 0
        assert row["suite"] == "pipeline" or ("speedup" in row) == (row["candidate"] != "reference")
        assert ("floor_ms" in row) == (row["rounds"] > 1)  # parts of a whole call have none
    assert "kernels kandinsky-6-pro" in capfd.readouterr().out


def test_a_case_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--cases: flux-3: expected some of flux, flux-1024"):
        list(run.listed(("kernels", "pipeline"), options(tmp_path, cases=["flux-3"])))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert run.main(["--device", "cuda"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err


def test_suites_name_the_models() -> None:
    names = {suite: [case.name for case in cases(suite, "cpu", torch.float32)] for suite in run.SUITES[:3]}
    assert names["kernels"] == names["policies"]
    assert set(names["kernels"]) == {
        "qwen-image-1024", "flux-1024", "flux-2-1024", "imagenet-256-batch-1", "imagenet-256-batch-512",
        "kandinsky-6-lite", "kandinsky-6-pro",
    }  # fmt: skip
    assert names["training"] == ["imagenet-256-batch-64", "imagenet-256-batch-512"]
    assert (GM_SHAPES["imagenet-256-batch-512"].batch, GM_SHAPES["imagenet-256-batch-512"].k) == (512, 32)
    pro = DX_SHAPES["kandinsky-6-pro"]
    assert (pro.spatial, pro.c) == ((1 + 120 // 4, 480 // 8, 864 // 8), 16)


MEMORY_OF_A_LOSS = """
import dataclasses, json
import torch
from benchmarks.measure import Settings, measure_case
from benchmarks.operations import Case, gm_policy_loss
from benchmarks.shapes import GM_SHAPES

shape = dataclasses.replace(GM_SHAPES["imagenet-256-batch-64"], batch=8)

def build(batch):
    operation = gm_policy_loss(shape, torch.float32, "cpu", batch, training=True)
    only = ("reference", "reference, checkpointed", "ours")
    return dataclasses.replace(operation, candidates={name: operation.candidates[name] for name in only})

rows = measure_case(Case("training", "x", 8, (build,)), Settings(seconds=0.0, least_rounds=1), {}, lambda *_: None)
print(json.dumps({row["candidate"]: row["peak_bytes"] for row in rows if row["pass"] == "both"}))
"""


@pytest.mark.slow
def test_checkpointing_and_the_fused_loss_need_less_memory_than_the_textbook() -> None:
    """In a process of its own, as the runner measures: what earlier tests freed would be used again, and not count."""
    done = subprocess.run([sys.executable, "-c", MEMORY_OF_A_LOSS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    means = 8 * 32 * 4 * 32 * 32 * 4
    assert peak["reference"] > 10 * means
    assert peak["ours"] < peak["reference, checkpointed"] < peak["reference"]
