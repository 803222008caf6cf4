"""Runs cells, two at a time in processes of one thread each; what is done stays done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.paper import checkerboard, toy
from benchmarks.paper.cells import WITHOUT_STUDENT, Budget, Cell, read_cell
from benchmarks.paper.measure import (
    in_batches,
    load_reference,
    measure_student,
    measure_teacher,
    read_protocol,
    reference_samples,
)
from benchmarks.paper.methods import Student, build_student
from benchmarks.paper.store import Store, write_tensors
from benchmarks.paper.train import curve, train

POLL_SECONDS = 0.5


def run_cell(cell: Cell, store: Store, command: str) -> None:
    """Train and measure one cell, or what of the two is missing, in this process."""
    store.folder.mkdir(parents=True, exist_ok=True)
    if not store.has_reference():
        write_tensors(store.reference, reference_samples(store.protocol))
    start = time.perf_counter()
    if cell.method in WITHOUT_STUDENT:
        rows = _beside(cell, store)
        store.save_measures(cell, rows | _account(command, time.perf_counter() - start))
        return
    student = _stored(cell, store) or _trained(cell, store, command)
    start = time.perf_counter()
    rows = measure_student(cell, student, load_reference(store.reference, store.protocol), store.protocol)
    store.save_measures(cell, rows | {"measure_seconds": round(time.perf_counter() - start, 1)})


def _beside(cell: Cell, store: Store) -> dict[str, Any]:
    small = {} if cell.budget == Budget() else {"iterations": cell.budget.iterations}
    if cell.method == "toy":
        return toy.run_digits(**small)
    if cell.method == "checkerboard":
        return checkerboard.run(**small)
    return measure_teacher(store.reference, store.protocol)


def _stored(cell: Cell, store: Store) -> Student | None:
    if store.training(cell) is None:
        return None
    student = build_student(cell)
    return student if store.load_weights(cell, student.network) else None


def _trained(cell: Cell, store: Store, command: str) -> Student:
    reference = load_reference(store.reference, store.protocol)
    noise, labels = (draw[: store.protocol.during_training] for draw in store.protocol.noise_and_labels())
    convergence: list[dict[str, float]] = []

    def on_checkpoint(iteration: int, student: Student) -> None:
        nfe = cell.sampled_nfes[0]
        x_0 = in_batches(lambda x, y: student.sample(x, y, nfe), noise, labels, store.protocol.batch_size)
        convergence.append({"iteration": iteration, **reference.measure(x_0)})

    student, losses, seconds = train(cell, on_checkpoint=on_checkpoint)
    account = _account(command, seconds) | {
        "parameters": sum(p.numel() for p in student.network.parameters()),
        "loss": [(iteration, round(loss, 6)) for iteration, loss in curve(losses)],
        "convergence": convergence,
    }
    store.save_training(cell, student.network, account)
    return student


def _account(command: str, seconds: float) -> dict[str, Any]:
    return {"command": command, "machine": machine(), "seconds": round(seconds, 1)}


def run_cells(
    cells: Sequence[Cell], store: Store, command: str, *, processes: int = 2, minutes: float | None = None
) -> list[Cell]:
    """Run what is not done yet, `processes` at a time, and begin none after `minutes`; returns the cells that failed.

    The first cell, the teacher, runs alone: all others need its samples.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    failed: list[Cell] = []
    for wave in (cells[:1], cells[1:]):
        left = [cell for cell in wave if not store.is_done(cell)]
        print(f"{len(wave) - len(left)} of {len(wave)} cells are there, {len(left)} to go", flush=True)
        failed += _Pool(store, command, processes).run(left, deadline)
        if failed and wave[0].method == "teacher":
            break
    return failed


class _Pool:
    """Subprocesses, one cell each; they end with it."""

    def __init__(self, store: Store, command: str, processes: int) -> None:
        self.store, self.command, self.processes = store, command, processes
        self.running: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}

    def run(self, cells: Sequence[Cell], deadline: float | None) -> list[Cell]:
        waiting, failed, finished, total = list(cells), list[Cell](), 0, len(cells)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.processes:
                    if deadline is not None and time.monotonic() > deadline:
                        print(f"time is up: {len(waiting)} cells are left for the next run", flush=True)
                        waiting.clear()
                        break
                    self._start(waiting.pop(0))
                for process in [p for p in self.running if p.poll() is not None]:
                    cell, started = self.running.pop(process)
                    done = process.returncode == 0 and self.store.is_done(cell)
                    failed += [] if done else [cell]
                    verdict = "done" if done else f"FAILED ({self.log_file(cell)})"
                    finished += 1
                    print(f"{finished}/{total} {cell.name}: {verdict}, {time.monotonic() - started:.0f} s", flush=True)
                time.sleep(POLL_SECONDS)
        finally:
            for process in self.running:
                process.terminate()
            for process in self.running:
                process.wait()
        return failed

    def log_file(self, cell: Cell) -> Path:
        return self.store.at(cell) / "log.txt"

    def _start(self, cell: Cell) -> None:
        self.store.at(cell).mkdir(parents=True, exist_ok=True)
        task = {
            "cell": cell.settings, "protocol": asdict(self.store.protocol),
            "folder": str(self.store.folder), "command": self.command,
        }  # fmt: skip
        with self.log_file(cell).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.paper", "cell", json.dumps(task)],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.running[process] = (cell, time.monotonic())


def run_task(text: str) -> None:
    """What a subprocess does: one cell, described in JSON, on one thread."""
    torch.set_num_threads(1)
    task = json.loads(text)
    run_cell(read_cell(task["cell"]), Store(Path(task["folder"]), read_protocol(task["protocol"])), task["command"])
