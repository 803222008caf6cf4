"""What `piflow doctor` finds out about a machine. Needs torch alone, and says so where even that is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import piflow

if TYPE_CHECKING:
    import torch

EXTRAS = ("diffusers", "training", "evaluation", "apps")
"""Those that are worth a line where something of them is missing."""


def diagnose(devices: list[torch.device], on_case: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Everything as one JSON object; `ok` says whether operators work and no version clashes."""
    from piflow.commands.self_test import self_test

    clashes = list(version_clashes())
    tested = self_test(devices, on_case)
    return {
        "ok": tested["passed"] and not clashes,
        "piflow": piflow.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed_packages(),
        "clashes": clashes,
        "missing": missing_packages(),
        "devices": [device_facts(device) for device in devices],
        "notes": list(notes()),
        "compilers": {name: shutil.which(name) for name in ("g++", "ninja")},
        "self_test": tested,
    }


def available_devices() -> list[torch.device]:
    """The CPU and every GPU that torch can use."""
    import torch

    gpus = [("cuda", torch.cuda), ("xpu", torch.xpu)]
    found = [torch.device(kind, i) for kind, of in gpus if of.is_available() for i in range(of.device_count())]
    return [torch.device("cpu"), *found]


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, and the backend that operators choose for tensors on a device."""
    import torch

    from piflow_kernels.arguments import resolve_backend

    facts: dict[str, Any] = {"device": str(device)}
    if device.type == "cpu":
        facts |= {"name": _processor(), "threads": torch.get_num_threads()}
    else:
        of = getattr(torch, device.type)
        properties = of.get_device_properties(device)
        facts |= {"name": properties.name, "memory": properties.total_memory}
        if device.type == "cuda":
            facts |= {"capability": ".".join(map(str, of.get_device_capability(device)))}
    try:
        return {**facts, "backend": resolve_backend(None, device, torch.float32)}
    except ValueError as error:
        return {**facts, "backend": None, "problem": str(error)}


def notes() -> Iterator[str]:
    """What is no fault of an installation, and still may not be what the person expects."""
    import torch

    build = torch.version.cuda or torch.version.hip
    if build and not torch.cuda.is_available():
        yield f"torch is built for GPUs ({build}), but finds none that it can use: is there one, and its driver?"
    if not build and shutil.which("nvidia-smi"):
        yield "there is an NVIDIA driver, but this torch is built for the CPU: install one built for CUDA."
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1 is set: kernels would be interpreted, which takes a hundred times as long and more."
    if shutil.which("g++") is None:
        yield "g++ is missing: backend='inductor' and DeepSpeed compile with it (Debian, Ubuntu: apt-get install g++)."
    if _packaging() is None:
        yield "versions were not compared with the ranges that piflow asks for: pip install packaging."


def installed_packages() -> dict[str, str]:
    """{package: version} of everything that piflow's metadata names and that is here."""
    names = sorted({name for name, _, _ in _requirements("piflow")})
    return {name: version for name in names if (version := _version(name))}


def version_clashes() -> Iterator[dict[str, str]]:
    """Installed versions outside the ranges that piflow asks for, or torch of its triton."""
    asked_for = [("piflow", *requirement) for requirement in _requirements("piflow")]
    asked_for += [("torch", *r) for r in _requirements("torch") if r[0].startswith(("triton", "pytorch-triton"))]
    seen = set()
    for owner, name, needed, _ in asked_for:
        version = _version(name)
        if version and (owner, name) not in seen and not _is_within(version, needed):
            seen.add((owner, name))
            yield {"package": name, "installed": version, "needed": needed, "by": owner}
    python = _python_needed()
    if python and not _is_within(platform.python_version(), python):
        yield {"package": "python", "installed": platform.python_version(), "needed": python, "by": "piflow"}


def missing_packages() -> dict[str, list[str]]:
    """{extra: packages of it that are not here}; "" stands for what every installation needs."""
    missing: dict[str, list[str]] = {}
    for name, _, extra in _requirements("piflow"):
        if (not extra or extra in EXTRAS) and not _version(name):
            missing.setdefault(extra, []).append(name)
    return missing


def extra_with(module: str) -> str:
    """The extra that brings the package of a module; "training", the largest, where none is known to."""
    package = {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(module, module).replace("_", "-").lower()
    extras = [
        extra for name, _, extra in _requirements("piflow") if extra and name.replace("_", "-").lower() == package
    ]
    return extras[0] if extras else "training"


def as_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    yield f"piflow {report['piflow']}, Python {report['python']}, {report['platform']}"
    yield "packages     " + ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    for extra, names in report["missing"].items():
        remedy = f"pip install 'piflow[{extra}]'" if extra else "pip install piflow"
        yield f"not here     {', '.join(names)}: {remedy}"
    for clash in report["clashes"]:
        yield "CLASH        {package} {installed}: {by} needs {needed}".format_map(clash)
    for device in report["devices"]:
        more = [f"{device['memory'] / 1e9:.1f} GB" if "memory" in device else f"{device['threads']} threads"]
        more += [f"compute capability {device['capability']}"] if "capability" in device else []
        runs = f"operators run with {device['backend']}" if device["backend"] else f"NOTHING RUNS: {device['problem']}"
        yield f"{device['device']:<12} {device['name']}, {', '.join(more)}: {runs}"
    for note in report["notes"]:
        yield f"note         {note}"
    tested = report["self_test"]
    failed = [case for case in tested["cases"] if not case["passed"]]
    for case in failed:
        how = case.get("raised") or f"off by {case['error']:.1e}, at most {case['tolerance']:.0e} is rounding"
        yield f"FAILED       {case['operator']} on {case['device']}, network output in {case['network']}: {how}"
    single = [case["error"] for case in tested["cases"] if case["network"] == "float32" and "error" in case]
    passed = f"{len(tested['cases']) - len(failed)} of {len(tested['cases'])}"
    yield (
        f"self-test    {passed} calls of operators agree with the float64 textbook, gradients too "
        f"(float32: within {max(single, default=0):.0e}; {tested['seconds']:.1f} s)"
    )
    yield "All is well." if report["ok"] else "Not all is well: see the lines in capitals."


def _requirements(package: str) -> Iterator[tuple[str, str, str]]:
    """(package, versions, extra) of what a package asks for on this platform, from its own metadata."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return
    for line in lines:
        needed, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        other = re.search(r"platform_system\s*==\s*['\"](\w+)['\"]", marker)
        if other and other[1] != platform.system():
            continue
        name = re.match(r"[\w.-]+", needed.strip())
        if name and not (extra and extra[1] in ("dev", "docs", "all")):
            yield name[0], needed.strip()[name.end() :].strip(" ()"), extra[1] if extra else ""


def _python_needed() -> str | None:
    try:
        return metadata.metadata("piflow")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_within(version: str, needed: str) -> bool:
    """Whether a version is in a range such as ">=0.42,<0.43"; builds such as 2.13.0+cpu count as 2.13.0."""
    library = _packaging()
    if library is None:
        return True
    return importlib.import_module(f"{library}.specifiers").SpecifierSet(needed).contains(version, prereleases=True)


def _packaging() -> str | None:
    """The library that compares versions, if need be pip's own copy; None where there is neither."""
    with contextlib.suppress(ModuleNotFoundError):
        return next((name for name in ("packaging", "pip._vendor.packaging") if importlib.util.find_spec(name)), None)
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()
