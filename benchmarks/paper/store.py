"""Cells on disk: <folder>/<id>/ with student.safetensors, training.json and measures.json, each whole or absent."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.paper.cells import WITHOUT_STUDENT, Budget, Cell, read_cell
from benchmarks.paper.measure import Protocol


@dataclass(frozen=True)
class Store:
    """A folder of cells, measured by one protocol."""

    folder: Path
    protocol: Protocol = field(default_factory=Protocol)

    @property
    def reference(self) -> Path:
        """The teacher's samples under this protocol."""
        return self.folder / f"reference-{self.protocol.id}.safetensors"

    def has_reference(self) -> bool:
        """Whether they are there and whole."""
        try:
            return {"x_0", "other"} <= load_file(self.reference).keys()
        except (OSError, SafetensorError):
            return False

    def at(self, cell: Cell) -> Path:
        """The cell's own folder."""
        return self.folder / cell.id

    def training(self, cell: Cell) -> dict[str, Any] | None:
        """The account of a training that is done, with its weights in place; None otherwise."""
        return read_json(self.at(cell) / "training.json") if self.weights_file(cell).is_file() else None

    def weights_file(self, cell: Cell) -> Path:
        """Of the averaged student."""
        return self.at(cell) / "student.safetensors"

    def load_weights(self, cell: Cell, network: torch.nn.Module) -> bool:
        """Put the stored weights into the network; False where they are damaged or another network's."""
        try:
            network.load_state_dict(load_file(self.weights_file(cell)))
        except (OSError, SafetensorError, RuntimeError):
            return False
        return True

    def save_training(self, cell: Cell, network: torch.nn.Module, account: dict[str, Any]) -> None:
        """Weights first, so that an account always has them."""
        self.at(cell).mkdir(parents=True, exist_ok=True)
        write_tensors(self.weights_file(cell), {k: v.contiguous() for k, v in network.state_dict().items()})
        write_json(self.at(cell) / "training.json", {"settings": cell.settings, **account})

    def measures(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured of the cell under this protocol, or None."""
        found = read_json(self.at(cell) / "measures.json")
        return found if found is not None and found.get("protocol") == self.protocol.id else None

    def save_measures(self, cell: Cell, measures: dict[str, Any]) -> None:
        """The end of a cell."""
        self.at(cell).mkdir(parents=True, exist_ok=True)
        write_json(self.at(cell) / "measures.json", {"protocol": self.protocol.id, **measures})

    def is_done(self, cell: Cell) -> bool:
        """Whether nothing of the cell is left to do."""
        return self.measures(cell) is not None and (cell.method in WITHOUT_STUDENT or self.training(cell) is not None)

    def result(self, cell: Cell) -> dict[str, Any]:
        """All that is known of a cell that is done."""
        measures = self.measures(cell)
        assert measures is not None
        return {"id": cell.id, "settings": cell.settings, **(self.training(cell) or {}), **measures}


def collect(store: Store, cells: Iterable[Cell], earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """One document of all cells that are done, in order; those of an `earlier` document stay where protocol and recipe
    are today's.
    """
    protocol = {"id": store.protocol.id, **asdict(store.protocol)}
    found: dict[str, Any] = {}
    if earlier is not None and earlier.get("protocol", {}).get("id") == store.protocol.id:
        found = {result["id"]: result for result in earlier["cells"] if cell_of(result).id == result["id"]}
    found |= {cell.id: rounded(store.result(cell)) for cell in cells if store.is_done(cell)}
    order = {cell.id: i for i, cell in enumerate(cells)}
    return {"protocol": protocol, "cells": sorted(found.values(), key=lambda r: order.get(r["id"], len(order)))}


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats, however deep, to so many significant digits: more would only be bytes."""
    if isinstance(value, dict):
        return {key: rounded(v, digits) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def other_run(document: dict[str, Any], protocol: Protocol, budget: Budget) -> str | None:
    """What keeps a document's results from standing beside those of this protocol and budget, for people; or None."""
    if document.get("protocol", {}).get("id") != protocol.id:
        return "were measured otherwise (--samples)"
    if any(cell_of(result).budget != budget for result in document.get("cells", ())):
        return "had another budget (--iterations, --batch-size)"
    return None


def cell_of(result: dict[str, Any]) -> Cell:
    """The cell of a stored result."""
    return read_cell(result["settings"])


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none or it is not whole."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = _partial(file)
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, file)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all."""
    partial = _partial(file)
    save_file(tensors, partial)
    os.replace(partial, file)


def _partial(file: Path) -> Path:
    """Of this process: a cell that outlived a killed run may be writing the same file."""
    return file.with_suffix(f".{os.getpid()}.partial")


def command_line(words: Iterable[str]) -> str:
    """As a person would type it."""
    return shlex.join(["python", "-m", "benchmarks.paper", *words])
