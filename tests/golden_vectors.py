"""Read the reference vectors in tests/golden (their README says what they are and what they are not)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    id: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Any]
    scalars: dict[str, Any]
    raw: dict[str, Any]


@dataclass(frozen=True)
class Group:
    name: str
    tensors: dict[str, Tensor]
    cases: list[Case]
    raw: dict[str, Any]

    def __getitem__(self, case_id: str) -> Case:
        return next(case for case in self.cases if case.id == case_id)


def _resolve(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Tensor names become tensors, also inside nested lists and mappings."""
    if isinstance(value, str):
        return tensors[value]
    if isinstance(value, dict):
        return {key: _resolve(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, tensors) for item in value]
    return value


@cache
def load_group(name: str) -> Group:
    raw = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    cases = [
        Case(
            id=case["id"],
            inputs=_resolve(case.get("inputs", {}), tensors),
            outputs=_resolve(case.get("outputs", {}), tensors),
            scalars=case.get("scalars", {}),
            raw=case,
        )
        for case in raw["cases"]
    ]
    return Group(name, tensors, cases, raw)
