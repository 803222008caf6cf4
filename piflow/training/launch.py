"""Start a distillation run through the real `deepspeed` launcher, on GPUs or on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

import psutil
import torch

from piflow.training.errors import Interrupted, TrainingError
from piflow.training.signals import STOP_SIGNALS, ranks_below


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
    the last lines of the output where the run fails, Interrupted where a signal stopped it.
    """
    command = ["piflow.train", str(config_path), *overrides, "--resume", resume]
    launch_module(command, num_processes, on_line=on_line)


def launch_module(command: Sequence[str], num_processes: int, *, on_line: Callable[[str], None] = print) -> None:
    """Run a Python module (`command[0]`, then its arguments) on `num_processes` ranks of this machine."""
    tail: deque[str] = deque(maxlen=20)
    with _SignalsToRanks() as signals:
        process = subprocess.Popen(
            launcher_command(command, num_processes),
            env=launcher_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C in the terminal reaches the ranks once, through us
        )
        signals.watch(process)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                tail.append(line.rstrip("\n"))
                on_line(tail[-1])
            code = process.wait()
        except BaseException:  # of `on_line`: nobody would read what the ranks say
            _end(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            _end(process, signal.SIGKILL)
            raise
    said = "\n".join(line for line in tail if line.strip() and "[launch.py:" not in line)
    if signals.received:
        name = signal.Signals(signals.received).name
        raise Interrupted(f"`{' '.join(command)}` was stopped by {name}. Its last lines:\n{said}", signals.received)
    if code:
        error = TrainingError(f"`{' '.join(command)}` {_describe(code)}. Its last lines:\n{said}")
        error.exit_code = code if code > 0 else 128 - code
        raise error


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
    """This environment, with what DeepSpeed needs without a GPU: gloo and one thread per rank."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


class _SignalsToRanks:
    """Passes SIGINT and SIGTERM to the ranks: the launcher itself would leave them behind, or kill them after 30 s.

    Before there are ranks, the launcher goes.
    """

    def __init__(self) -> None:
        self.received = 0
        self.launcher: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def watch(self, launcher: subprocess.Popen[str]) -> None:
        """From now on to the ranks of `launcher`; so does a signal that came before it was there."""
        self.launcher = launcher
        if self.received:
            self._forward(self.received, None)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.launcher is None:
            return
        ranks = ranks_below(self.launcher.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
        if not ranks:
            _end(self.launcher, signal.SIGTERM)


def _end(launcher: subprocess.Popen[str], number: int) -> None:
    """Send a signal to the launcher's whole session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, number)


def _describe(code: int) -> str:
    """The launcher passes the death of a rank by signal n on as exit code 256 - n."""
    number = -code if code < 0 else 256 - code
    if number in signal.valid_signals():
        name = signal.Signals(number).name
        hint = " (the system does that when memory runs out)" if number == signal.SIGKILL else ""
        return f"lost a process, killed by {name}{hint}"
    return f"ended with exit code {code}"
