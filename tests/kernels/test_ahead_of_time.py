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

from piflow_kernels.dx import kernels as dx  # noqa: E402
from piflow_kernels.gm import kernels as gm  # noqa: E402
from piflow_kernels.launch import DX_LAUNCH, gm_launch_config, kernel_form  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NETWORK = {"means", "logweights", "means_bar", "logweights_bar", "grid", "grid_bar"}
STATES = {"x_start", "x_src", "result", "grad", "start_bar", "src_bar"}
SCALARS = {"steps", "out", "steps_bar", "out_bar", "history", "stream", "stats", "weights"}

FORMS: list[tuple[str, int, int]] = [
    ("gram", 1, 4),
    ("gram", 8, 16),
    ("gram", 8, 128),
    ("channel", 1, 16),
    ("channel", 8, 16),
    ("channel", 32, 4),
    ("streamed", 5, 3),
    ("streamed", 8, 16),
    ("streamed", 16, 16),
    ("streamed", 8, 64),
    ("streamed", 64, 128),
    ("backward", 8, 1),
    ("backward", 8, 16),
    ("backward", 32, 4),
    ("backward", 16, 16),
    ("backward", 8, 64),
    ("backward", 64, 128),
]
KERNELS = {
    "gram": gm.gm_gram_rollout_kernel,
    "channel": gm.gm_channel_rollout_kernel,
    "streamed": gm.gm_streamed_rollout_kernel,
    "backward": gm.gm_streamed_backward_kernel,
}


def specialisations() -> dict[str, tuple[Any, dict[str, int], int]]:
    """Kernel, constants and warps as the launch rule gives them."""
    cases = {}
    for form, k, c in FORMS:
        config = gm_launch_config("streamed" if form == "backward" else form, k, c)
        constants = {"K": k, "C": c, "BLOCK": config.block, **config.tiles}
        cases[f"{form}-K{k}-C{c}"] = (KERNELS[form], constants, config.num_warps)
    for n in (1, 10, 20):
        for name, kernel in (("rollout", dx.dx_rollout_kernel), ("backward", dx.dx_backward_kernel)):
            cases[f"dx-{name}-N{n}"] = (kernel, {"N": n, "BLOCK": DX_LAUNCH.block}, DX_LAUNCH.num_warps)
    return cases


SPECIALISATIONS = specialisations()


def signature(kernel: Any, constants: dict[str, int], network_dtype: str) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in NETWORK:
            types[name] = f"*{network_dtype}"
        else:
            types[name] = "*fp32" if name in STATES | SCALARS else "i32"
    return types


def test_the_form_is_one_that_fits() -> None:
    """One rule from (K, C, N), never an error and never a spill."""
    assert kernel_form(8, 16, 37) == "gram"
    assert kernel_form(8, 16, 1) == "channel"
    assert kernel_form(32, 4, 128) == "channel"
    assert kernel_form(8, 64, 1) == "gram"  # channel space would be cheaper, but does not fit
    assert kernel_form(16, 16, 37) == "streamed"


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("network_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SPECIALISATIONS)
def test_compiles_without_spills(name: str, network_dtype: str, capability: int, tmp_path: Path) -> None:
    kernel, constants, num_warps = SPECIALISATIONS[name]
    unit_strides = {argument: 1 for argument in kernel.arg_names if argument.endswith("_w") or argument == "grid_z"}
    constants = constants | unit_strides
    types = signature(kernel, constants, network_dtype)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if types[argument] != "constexpr" and argument not in ("n_steps", "n_blocks")
    }
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("STACK", "LOCAL"))
    assert (stack, local) == (0, 0), usage
