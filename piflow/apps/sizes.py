"""How large a picture may be: one answer of the command, the web demo and the ComfyUI nodes."""

from __future__ import annotations

LONGEST_SIDE = 2048
"""In pixels. The base models are made for 1 to 4 megapixels."""


def too_large(name: str, side: float) -> str:
    """For people: `side`, of the option or control `name`, is above LONGEST_SIDE, and why that is the limit."""
    return (
        f"{name}: expected at most {LONGEST_SIDE} pixels a side, got {side:.0f}. The models are made for pictures of "
        "1 to 4 megapixels: larger ones repeat what they show, and attention's time grows as the side's fourth power."
    )
