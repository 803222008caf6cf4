"""`warmup`: every operator runs once, and every wrong argument is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from piflow_kernels import warmup
from piflow_kernels.compilation import OPERATORS


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", ["spatial", "packed"])
def test_every_operator_warms_up(operator: str, layout: Any) -> None:
    """Also from within `inference_mode`, as a server calls it, and with its own gradient setting left alone."""
    shape: dict[str, Any] = {"components": 3, "channels": 4, "spatial": (6, 4), "batch": 2, "substeps": 3}
    for backward in (False, True):
        warmup(operator, **shape, layout=layout, backward=backward, device="cpu")
        with torch.inference_mode():
            warmup(operator, **shape, layout=layout, backward=backward, device="cpu", dtype=torch.float32)
            assert torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


ERRORS = [
    ({"operator": "rollout"}, "operator: expected one of gm_velocity"),
    ({"operator": ["gm_rollout"]}, "operator: expected one of gm_velocity"),
    ({"layout": "tokens"}, "layout: expected one of"),
    ({"layout": "packed", "spatial": (4,)}, "spatial: expected (tokens, sub_pixels) in the packed layout"),
    ({"spatial": 5}, "spatial: expected one to three axes"),
    ({"spatial": None}, "spatial: expected one to three axes"),
    ({"spatial": ()}, "spatial: expected one to three axes"),
    ({"spatial": (4, 0)}, "spatial: expected a positive integer, got 0"),
    ({"components": 0}, "components: expected a positive integer, got 0"),
    ({"channels": 1.5}, "channels: expected a positive integer, got 1.5"),
    ({"substeps": True}, "substeps: expected a positive integer, got True"),
    ({"batch": "2"}, "batch: expected a positive integer, got '2'"),
    ({"dtype": "bfloat16"}, "dtype: expected torch.float32, torch.bfloat16"),
    ({"dtype": None}, "dtype: expected torch.float32, torch.bfloat16"),
    ({"dtype": torch.int64}, "dtype: expected torch.float32, torch.bfloat16"),
    ({"device": "gpu"}, "device: 'gpu'"),
    ({"device": None}, "device: expected a torch.device or its name, got None"),
    ({"backward": "yes"}, "backward: expected True or False, got str"),
    ({"backend": "cuda"}, "backend: expected None or one of"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"components": 3, "channels": 4, "spatial": (6, 4), "device": "cpu"}
    with pytest.raises(ValueError, match=re.escape(message)):
        warmup(**{**good, **change})
