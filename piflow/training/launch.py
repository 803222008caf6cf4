"""Start a distillation run through the real `deepspeed` launcher, on GPUs or on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from piflow.training.errors import TrainingError


def launch_training(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    num_processes: int = 2,
    *,
    resume: str = "auto",
    on_line: Callable[[str], None] = print,
) -> None:
    """Run `deepspeed --module piflow.train CONFIG overrides` to its end; every line of its output goes to `on_line`.

    SIGINT and SIGTERM sent to this process are passed on to the ranks, which save and stop. Raises TrainingError with
    the last lines of the output where the run fails or is stopped.
    """
    command = ["piflow.train", str(config_path), *overrides, "--resume", resume]
    launch_module(command, num_processes, on_line=on_line)


def launch_module(command: Sequence[str], num_processes: int, *, on_line: Callable[[str], None] = print) -> None:
    """Run a Python module (`command[0]`, then its arguments) on `num_processes` ranks of this machine."""
    tail: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(
        launcher_command(command, num_processes),
        env=launcher_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C in the terminal reaches the ranks once, through us
    )
    with _signals_to_ranks(process):
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip("\n"))
            on_line(tail[-1])
        code = process.wait()
    if code:
        said = "\n".join(line for line in tail if line.strip() and "[launch.py:" not in line)
        raise TrainingError(f"`{' '.join(command)}` ended with exit code {code}. Its last lines:\n{said}")


def launcher_command(command: Sequence[str], num_processes: int) -> list[str]:
    """The command line of the `deepspeed` launcher that belongs to this Python."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_processes),
        "--master_addr", "127.0.0.1", "--master_port", str(port), "--log_level", "error",
        "--module", *command,
    ]  # fmt: skip


def launcher_environment() -> dict[str, str]:
    """This environment, with what DeepSpeed needs: ninja on PATH; without a GPU, gloo and one thread per rank."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


@contextlib.contextmanager
def _signals_to_ranks(launcher: subprocess.Popen[str]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM to the ranks: the launcher itself would leave them behind, or kill them after 30 s."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(launcher.pid).children(recursive=True):
                if "RANK" in process.environ():
                    process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
