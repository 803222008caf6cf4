"""Source distribution and wheel: built for real, installed into an environment of its own, used elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".*", "outputs", "build", "dist", "*.egg-info", "__pycache__", "site", "samples")

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **environment: str) -> str:
    outer = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**outer, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution of this checkout, and the wheel that is built of nothing else."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = "from setuptools import build_meta; build_meta.build_{}('..')"
    run(sys.executable, "-c", build.format("sdist"), cwd=folder / "checkout")
    (sdist,) = folder.glob("piflow-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", build.format("wheel").replace("'..'", "'../..'"), cwd=source)
    (wheel,) = folder.glob("piflow-*.whl")
    return {"sdist": sdist, "wheel": wheel, "source": source}


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, which sees the libraries of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built["wheel"], cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    (Path(site) / "libraries.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python.parent


def test_wheel_holds_the_packages_and_what_they_read(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    for package in ("piflow", "piflow_kernels"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert modules <= names
        assert f"{package}/py.typed" in names
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "piflow/digits/weights").rglob("*.*")}
    assert weights <= names
    assert "piflow/configs/digits/nfe1.yaml" in names
    outside = {name.split("/")[0] for name in names} - {"piflow", "piflow_kernels"}
    assert all(name.endswith(".dist-info") for name in outside)


def test_source_distribution_holds_what_the_tests_and_people_need(built: dict[str, Path]) -> None:
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml"):
        assert (built["source"] / name).is_file()
    for folder in ("configs", "docs", "examples", "benchmarks", "tests"):
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        here = {path for path in here if "__pycache__" not in path.parts}
        there = {path.relative_to(built["source"]) for path in (built["source"] / folder).rglob("*") if path.is_file()}
        assert here <= there, sorted(here - there)[:5]


def test_installed_command_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import piflow_kernels; print(piflow_kernels.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    assert run(installed / "piflow", "--version", cwd=tmp_path).startswith("piflow ")
    report = json.loads(run(installed / "piflow", "doctor", "--json", cwd=tmp_path))
    assert report["self_test"]["passed"]
    assert run(installed / "piflow", "sample", "digits", "--class", "3", cwd=tmp_path) == "samples/00001.png\n"
    assert "the configurations are found" in run(
        installed / "python",
        "-c",
        "from piflow.commands.demo import default_configs as found\n"
        "assert all(path.is_file() for path in found())\nprint('the configurations are found')",
        cwd=tmp_path,
    )
