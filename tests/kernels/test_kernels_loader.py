"""The package as others load it: through Hugging Face's `kernels`, beside an installed copy, with torch alone."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import kernels
import pytest
import torch

import piflow_kernels
from tests.kernels.problems import GM_LEAVES, dx_problem, gm_problem, values_and_gradients

PACKAGE = Path(piflow_kernels.__file__).parent
METADATA = json.loads((PACKAGE / "metadata.json").read_text())


@pytest.fixture(scope="module")
def hub() -> ModuleType:
    """The source folder as a build variant, loaded where the package itself is imported too."""
    with pytest.MonkeyPatch.context() as here:
        here.chdir(PACKAGE.parent)
        return kernels.get_local_kernel(Path(PACKAGE.name))  # as the README does, so that one process holds one copy


def test_the_copy_is_a_package_of_its_own(hub: ModuleType) -> None:
    assert hub.__name__ == METADATA["id"]
    assert hub is not piflow_kernels
    assert Path(hub.__file__) == PACKAGE / "__init__.py"
    assert hub.__all__ == piflow_kernels.__all__


def test_both_copies_compute_and_differentiate(hub: ModuleType) -> None:
    """In turns, because a copy that took over the other's operators would show only then."""
    problem = gm_problem(dtype=torch.float32)
    first, second, again = (
        values_and_gradients(package.gm_rollout, problem, GM_LEAVES)
        for package in (piflow_kernels, hub, piflow_kernels)
    )
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    grid = dx_problem(dtype=torch.float32)
    assert torch.equal(hub.dx_rollout(**grid), piflow_kernels.dx_rollout(**grid))


def test_each_copy_has_operators_of_its_own(hub: ModuleType) -> None:
    """What a graph holds names the copy that it was traced with."""

    def namespaces(package: ModuleType) -> set[str]:
        problem = gm_problem(dtype=torch.float32)
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda means: package.gm_rollout(**{**problem, "means": means})
        )(problem["means"]).graph
        targets = {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "call_function"}
        return {name for name in targets if name not in ("aten", "prims")}

    installed, loaded = namespaces(piflow_kernels), namespaces(hub)
    assert len(installed) == len(loaded) == 1
    assert installed.isdisjoint(loaded)


def test_the_copy_compiles(hub: ModuleType) -> None:
    problem = gm_problem(dtype=torch.float32)
    compiled = torch.compile(lambda means: hub.gm_rollout(**{**problem, "means": means}), fullgraph=True)
    torch.testing.assert_close(compiled(problem["means"]), piflow_kernels.gm_rollout(**problem))


def test_a_repository_as_it_is_published_loads_alone(tmp_path: Path) -> None:
    """build/torch-universal is a copy of the folder; nothing else of this project is on the path."""
    variant = tmp_path / "build" / "torch-universal"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    script = f"""
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
before = set(sys.modules)
package = get_local_kernel(Path({str(tmp_path)!r}))
x = torch.ones(1, 4, 3, 3)
args = x, torch.linspace(1, 0, 5), x, 1.0, torch.ones(1, 2, 4, 3, 3), -1.0, torch.zeros(1, 2, 1, 3, 3)
assert torch.allclose(package.gm_rollout(*args), package.gm_rollout(*args, backend="reference"))
assert Path(package.__file__).parent == Path({str(variant)!r})
mine = {{name for name in sys.modules if name.partition(".")[0] == {METADATA["id"]!r}}}
others = {{name.partition(".")[0] for name in set(sys.modules) - before - mine}}
assert not any(name.startswith(("piflow", "diffusers")) for name in others), others
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
def test_imports_are_relative_or_of_torch(source: Path) -> None:
    """triton only inside functions and in device code, which is imported inside functions."""
    tree = ast.parse(source.read_text())
    at_top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [(node.module or "").partition(".")[0]]
        else:
            continue
        for name in names:
            if name == "triton":
                assert id(node) not in at_top or "kernels" in source.relative_to(PACKAGE).with_suffix("").parts
            else:
                assert name == "torch" or name in sys.stdlib_module_names, f"{source.name} imports {name}"
