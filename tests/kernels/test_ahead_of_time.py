"""Kernels compile ahead of time, without a GPU, for every generation supported, and nothing spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from piflow_kernels.gm import kernels  # noqa: E402
from piflow_kernels.launch import kernel_form  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
GRAM, CHANNEL = kernels.gm_gram_rollout_kernel, kernels.gm_channel_rollout_kernel
SPECIALISATIONS = {
    "gram-K8-C16": (GRAM, {"K": 8, "C": 16, "BLOCK": 128}),
    "gram-K8-C64": (GRAM, {"K": 8, "C": 64, "BLOCK": 128}),
    "channel-K32-C4": (CHANNEL, {"K": 32, "C": 4, "K_TILE": 32, "BLOCK": 32}),
    "channel-K8-C16": (CHANNEL, {"K": 8, "C": 16, "K_TILE": 8, "BLOCK": 32}),
}


def signature(kernel: Any, constants: dict[str, int], network_dtype: str) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("means", "logweights"):
            types[name] = f"*{network_dtype}"
        elif name in ("x_start", "x_src", "steps", "out", "result"):
            types[name] = "*fp32"
        else:
            types[name] = "i32"
    return types


def test_the_form_is_one_that_fits() -> None:
    """One rule from (K, C, N); what no kernel covers is None, never a spill."""
    assert kernel_form(8, 16, 37) == "gram"
    assert kernel_form(8, 16, 1) == "channel"
    assert kernel_form(32, 4, 128) == "channel"
    assert kernel_form(8, 64, 1) == "gram"  # channel space would be cheaper, but does not fit
    assert kernel_form(16, 16, 37) is None


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("network_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SPECIALISATIONS)
def test_compiles_without_spills(name: str, network_dtype: str, capability: int, tmp_path: Path) -> None:
    kernel, constants = SPECIALISATIONS[name]
    constants = constants | {f"{tensor}_w": 1 for tensor in ("start", "src", "mean", "weight", "result")}
    types = signature(kernel, constants, network_dtype)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if types[argument] != "constexpr" and argument != "n_steps"
    }
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("STACK", "LOCAL"))
    assert (stack, local) == (0, 0), usage
