"""Runs operators on the Triton backend in a process of its own, where triton was imported to interpret kernels.

`python -m tests.kernels.interpreter` reads lines "REQUEST ANSWER" of two file names, until its input ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Interpreter:
    """A child process that interprets kernels. A context manager."""

    def __enter__(self) -> Interpreter:
        self.folder = tempfile.TemporaryDirectory()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.child.communicate()
        self.folder.cleanup()

    def __call__(self, operator: str, problem: dict[str, Any], leaves: list[str], **kwargs: Any) -> list[Tensor]:
        """Value and gradients of an operator, as `problems.values_and_gradients` gives them."""
        request, answer = (f"{self.folder.name}/{name}.pt" for name in ("request", "answer"))
        torch.save((operator, problem, leaves, kwargs), request)
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{request} {answer}\n")
        self.child.stdin.flush()
        said = self.child.stdout.readline()
        assert said == "done\n", "the interpreter failed: its traceback is on stderr"
        return torch.load(answer, weights_only=True)


def serve() -> None:
    import piflow_kernels as pk
    from tests.kernels.problems import values_and_gradients

    for line in sys.stdin:
        request, answer = line.split()
        operator, problem, leaves, kwargs = torch.load(request, weights_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # poison: what a kernel forgets to write is NaN
        torch.use_deterministic_algorithms(True)
        try:
            results = values_and_gradients(getattr(pk, operator), problem, leaves, backend="triton", **kwargs)
        except Exception:
            traceback.print_exc()
            print("failed", flush=True)
        else:
            torch.save(results, answer)
            print("done", flush=True)


if __name__ == "__main__":
    serve()
