"""What a reader needs to place a figure: versions, processor, GPU and its clocks."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers")


def machine() -> dict[str, Any]:
    facts: dict[str, Any] = {"python": platform.python_version(), "processor": _processor(), "cores": os.cpu_count()}
    facts |= {package: _version(package) for package in PACKAGES} | {"threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        return facts | {"gpu": "none"}
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        values = [torch.cuda.get_device_name()]
    facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts | dict(zip(query.split(","), values))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
