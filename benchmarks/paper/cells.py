"""The cells of the tables: what is trained, with which settings, and in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Method = Literal["teacher", "toy", "checkerboard", "gm", "dx", "shortcut", "meanflow"]

WITHOUT_STUDENT = ("teacher", "toy", "checkerboard")
"""Of digits: these have results, and no weights to keep."""

GUIDANCE_SCALE = 2.0
TOTAL_SUBSTEPS = 128
EMA_GAMMA = 7.0
GRADIENT_CLIPPING = 1.0
SHORTCUT_TEACHER_STEPS = 8
"""Euler steps of the teacher that make the shortcut's target: four times the teacher calls of pi-ID."""

COMMON = (GUIDANCE_SCALE, TOTAL_SUBSTEPS, EMA_GAMMA, GRADIENT_CLIPPING, SHORTCUT_TEACHER_STEPS)
"""What no cell chooses, and yet decides its result."""

SEEDS = (0, 1, 2)
NFES = (1, 2, 4)
DROPOUT = 0.05
"""Of mixture components, unless a cell says otherwise."""

MEANFLOW_SHARE = 0.75
MEANFLOW_STEP = 0.01
"""Of the noise level, in the central difference that stands for the derivative."""


@dataclass(frozen=True)
class Budget:
    """What all students share: iterations, network evaluations per iteration, and AdamW's learning rate."""

    iterations: int = 400
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_iterations: int = 50

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cell:
    """One training of a digits student, or one of the three things beside them.

    size: components K of "gm", grid points N of "dx". nfe: segments that the student is trained for. data_free: all
    segments in turn from pure noise, with a batch smaller by nfe, so that the network is evaluated as often. dropout:
    of components. window: substeps of the micro-window. mixing: the teacher's share of the trajectory falls from 1 to 0
    over two thirds of the iterations, as in the recipes of FLUX.1; without it the trajectory is the student's own.
    share: of "meanflow" samples with an interval of some length; the others learn the velocity itself.
    """

    method: Method
    size: int = 0
    nfe: int = 1
    data_free: bool = False
    dropout: float = 0.0
    window: int = 0
    mixing: bool = False
    share: float = 0.0
    seed: int = 0
    budget: Budget = Budget()

    @property
    def id(self) -> str:
        """Hash of the settings and of what all cells, or all of a method, have in common."""
        own = (MEANFLOW_STEP,) if self.method == "meanflow" else ()
        return hashlib.sha256(json.dumps([self.settings, COMMON + own], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, Any]:
        """All fields, the budget nested."""
        return asdict(self)

    @property
    def variant(self) -> Cell:
        """The cell of seed 0: what seeds have in common."""
        return replace(self, seed=0)

    @property
    def name(self) -> str:
        """For people: "GM K=8, 4 NFE, data-free, seed 1"."""
        return f"{self.label}, seed {self.seed}"

    @property
    def label(self) -> str:
        """The name without the seed."""
        if self.method in WITHOUT_STUDENT:
            return self.method
        kind = {"gm": f"GM K={self.size}", "dx": f"DX N={self.size}", "shortcut": "shortcut", "meanflow": "MeanFlow"}
        parts = [kind[self.method]]
        if self.method != "meanflow":
            parts.append(f"{self.nfe} NFE")
        parts += ["data-free"] * self.data_free
        if self.method == "gm" and self.size > 1 and self.dropout != DROPOUT:
            parts.append(f"dropout {self.dropout:g}")
        parts += [f"window {self.window}"] * bool(self.window) + ["mixing"] * self.mixing
        return ", ".join(parts)

    @property
    def sampled_nfes(self) -> tuple[int, ...]:
        """The numbers of steps at which the student is measured."""
        return NFES if self.method == "meanflow" else (self.nfe,)

    @property
    def studied(self) -> bool:
        """Whether substeps, temperature and elastic NFE are varied at sampling."""
        plain = not (self.data_free or self.window or self.mixing)
        heads = {("gm", 8): DROPOUT, ("dx", 10): 0.0}
        return plain and heads.get((self.method, self.size)) == self.dropout and self.nfe in (1, 4)


def read_cell(settings: dict[str, Any]) -> Cell:
    """The cell that `Cell.settings` described."""
    return Cell(**{**settings, "budget": Budget(**settings["budget"])})


def gm(size: int = 8, nfe: int = 1, **settings: Any) -> Cell:
    """A GM student by pi-ID; a single component cannot be dropped."""
    return Cell("gm", size, nfe, **{"dropout": DROPOUT if size > 1 else 0.0, **settings})


def dx(size: int = 10, nfe: int = 1) -> Cell:
    """A DX student by pi-ID."""
    return Cell("dx", size, nfe)


def shortcut(nfe: int = 1) -> Cell:
    """A direct student; see benchmarks.paper.baselines."""
    return Cell("shortcut", nfe=nfe)


def meanflow() -> Cell:
    """A MeanFlow student, the same at every number of steps."""
    return Cell("meanflow", share=MEANFLOW_SHARE)


CORE: tuple[Cell, ...] = (
    gm(32), gm(8), gm(1), dx(10),
    gm(8, 2), gm(8, 4), dx(10, 4), gm(8, 4, data_free=True),
    gm(8, dropout=0.0), shortcut(), meanflow(),
)  # fmt: skip
"""With the checkerboard's student these are the 12 trainings of `make paper`."""

TEACHER, TOY, CHECKERBOARD = Cell("teacher"), Cell("toy"), Cell("checkerboard")
"""What runs once; the teacher first, whose samples all others need."""

ABLATIONS: tuple[Cell, ...] = (
    gm(8, window=3), gm(8, mixing=True),
    gm(8, 4, window=3), gm(8, 4, mixing=True), gm(8, 4, dropout=0.0),
    gm(8, 2, data_free=True), shortcut(4), shortcut(2),
)  # fmt: skip

HEADS: tuple[Cell, ...] = (
    gm(4), dx(5), dx(20),
    gm(1, 4), gm(4, 4), gm(32, 4), dx(5, 4), dx(20, 4),
    gm(1, 2), gm(4, 2), gm(32, 2), dx(5, 2), dx(10, 2), dx(20, 2),
)  # fmt: skip
"""The rest of GM with K = 1, 4, 8, 32 against DX with N = 5, 10, 20 at 1, 2 and 4 NFE."""


def core_cells(budget: Budget | None = None) -> list[Cell]:
    """The core, one seed, in the order in which it runs."""
    return list(_with_budget([TEACHER, *CORE, TOY, CHECKERBOARD], budget))


def full_cells(budget: Budget | None = None, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Everything: the core, a second seed of it, what ablates and the other heads once, then what is missing."""
    first, second = [*CORE, *ABLATIONS, *HEADS], [replace(cell, seed=seed) for seed in seeds[1:2] for cell in CORE]
    rest = [replace(cell, seed=seed) for seed in seeds[1:] for cell in first]
    ordered = dict.fromkeys([*CORE, *second, *first, *rest])
    return list(_with_budget([TEACHER, *CORE, TOY, CHECKERBOARD, *list(ordered)[len(CORE) :]], budget))


def _with_budget(cells: Sequence[Cell], budget: Budget | None) -> Iterator[Cell]:
    return (cell if budget is None else replace(cell, budget=budget) for cell in cells)
