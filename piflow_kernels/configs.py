"""How kernels are launched: a rule from (K, C, N), and a small frozen table of its constants on each GPU family.

`python -m benchmarks.launch_table` measures the table's candidates on the GPU at hand. Nothing is tried at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from .gm.torch_path import gram_space_is_cheaper

LARGEST_GRAM = 8
"""Components up to which K (K + 1) / 2 + 3 K live values per pixel stay in registers (DESIGN 2.2)."""

LARGEST_TILE, MOST_CHANNELS = 256, 16
"""Velocities and channels per pixel up to which channel space stays in registers."""

LARGEST_WINDOW = 4
"""Substeps of a window whose streamed adjoint needs no memory besides the gradients."""

Form = Literal["gram", "channel", "streamed"]
Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Family:
    """Constants for one family of GPUs.

    lanes: threads of a warp. gram_warps, gram_backward_warps: warps of a Gram-space program, a pixel to a thread.
    channel_elements: velocities of a pixel to a lane in channel space. streamed_elements, streamed_backward_elements:
    of each C_TILE x BLOCK tile to a lane. dx_block, dx_warps: elements and warps of a DX program. max_registers: of a
    thread in the GM kernels; given, it keeps ptxas from spilling for the sake of an occupancy that no rule wants.
    """

    lanes: int = 32
    gram_warps: int = 4
    gram_backward_warps: int = 4
    channel_elements: int = 64
    streamed_elements: int = 16
    streamed_backward_elements: int = 8
    dx_block: int = 1024
    dx_warps: int = 4
    max_registers: int | None = None


# Chosen by the compiled code (registers, spills, instructions; `python -m benchmarks.static_report`).
FAMILIES: dict[str, Family] = {
    "sm_80": Family(max_registers=255),
    "sm_90": Family(max_registers=255),
    "sm_100": Family(max_registers=255),
    "gfx94x": Family(lanes=64),
    "default": Family(),
}


@dataclass(frozen=True)
class LaunchConfig:
    """Pixels of one program, its warps, constants of its form besides K and C, registers of a thread."""

    block: int
    num_warps: int
    constants: dict[str, int]
    max_registers: int | None

    @property
    def keywords(self) -> dict[str, int]:
        """For a launch, besides the block."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **self.constants, **limit}


def coefficient_options(family: Family) -> dict[str, int]:
    """For the launches of the kernels that make the scalars per sample."""
    return {"num_warps": 4} | ({} if family.max_registers is None else {"maxnreg": family.max_registers})


@functools.cache
def family_of(device: torch.device) -> str:
    """The table's row for a device; Intel GPUs and unknown ones take the default."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx94x" if architecture.startswith("gfx94") else "default"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "default")


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def gm_form(n_components: int, n_channels: int, n_steps: int, direction: Direction) -> Form:
    """The cheaper of Gram and channel space among those that fit in registers; where neither does, streamed.

    A backward pass is in Gram space or streamed, which needs no memory for short windows: the adjoints of velocities
    held in registers would not fit with them.
    """
    k, c, n = n_components, n_channels, n_steps
    gram = k <= LARGEST_GRAM
    if direction == "backward":
        # What Gram space keeps is at most a quarter of a bfloat16 problem's inputs in a short window, where streaming
        # keeps nothing, and in a longer one at most what streaming keeps.
        small = 4 * k * max(n - 2, 0) <= (2 * k * c + 2 * k + 8 * c) / 4 if n <= LARGEST_WINDOW else k <= 2 * c + 3
        return "gram" if gram and small else "streamed"
    channel = next_power_of_2(k) * c <= LARGEST_TILE and c <= MOST_CHANNELS
    if gram and (not channel or gram_space_is_cheaper(k, c, n)):
        return "gram"
    return "channel" if channel else "streamed"


def gm_launch_config(
    form: Form, direction: Direction, n_components: int, n_channels: int, n_steps: int, family: Family
) -> LaunchConfig:
    """How a kernel of this form is launched on a GPU."""
    lanes = family.lanes
    if form == "gram":
        warps = family.gram_warps if direction == "forward" else family.gram_backward_warps
        return LaunchConfig(lanes * warps, warps, {}, family.max_registers)
    if form == "channel":
        # One warp, so that sums over components cross lanes but never warps: two lanes to a pixel, more where its
        # velocities would not fit in theirs.
        k_tile = next_power_of_2(n_components)
        split = min(max(k_tile * n_channels // family.channel_elements, 1), k_tile)
        return LaunchConfig(lanes // next_power_of_2(split), 1, {"K_TILE": k_tile}, family.max_registers)
    c_tile = next_power_of_2(n_channels)
    constants = {"C_TILE": c_tile}
    elements = family.streamed_elements
    if direction == "backward":
        window = n_steps if n_steps <= LARGEST_WINDOW else 0
        constants["WINDOW"] = window
        # Two tiles for each substep of a window are live at once.
        elements = family.streamed_backward_elements // (2 if window > 3 else 1)
    # One warp while it has at least eight pixels side by side; all channels of a pixel in few lanes.
    block = min(max(elements * lanes // c_tile, 8), lanes)
    warps = max(c_tile * block // (elements * lanes), 1)
    return LaunchConfig(block, warps, constants, family.max_registers)
