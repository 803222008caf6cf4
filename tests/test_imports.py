"""Importing touches no device and pulls in nothing that was not asked for, proved in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

EXTRAS = ["triton", "diffusers", "transformers", "deepspeed", "peft", "safetensors", "sklearn", "scipy", "matplotlib"]
EXTRAS += ["pydantic", "yaml", "rich", "tensorboard", "numpy", "accelerate"]


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_pull_in_torch_alone() -> None:
    """What `import piflow_kernels` loads beyond `import torch` is the standard library and itself."""
    script = """
import json, sys, torch
before = set(sys.modules)
import piflow_kernels
loaded = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps(sorted(loaded - {'torch'})))
"""
    assert json.loads(run(script)) == ["piflow_kernels"]


@pytest.mark.parametrize(
    "module",
    [
        "piflow_kernels",
        "piflow",
        "piflow.policies",
        "piflow.distillation",
        "piflow.sampler",
        "piflow.schedulers",
        "piflow.models",
    ],
)
def test_imports_without_extras_and_without_a_device(module: str) -> None:
    """As on a machine where nothing but torch is installed: triton and every extra are made unfindable."""
    script = f"""
import importlib, os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {set(EXTRAS)!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
import torch
environment = dict(os.environ)
importlib.import_module({module!r})
assert not torch.cuda.is_initialized()
assert dict(os.environ) == environment
"""
    run(script)


def test_operators_work_without_triton() -> None:
    script = """
import sys
sys.modules['triton'] = None
import torch, piflow_kernels as pk
x = torch.randn(1, 2, 4)
arguments = (x, torch.linspace(1, 0, 5), x, 1.0, torch.randn(1, 3, 2, 4), -1.0, torch.randn(1, 3, 1, 4))
pk.gm_rollout(*arguments)
try:
    pk.gm_rollout(*arguments, backend='triton')
except ValueError as error:
    print(error)
"""
    assert "triton is not installed" in run(script)
