"""Signals and locks around the training loop, with real processes and signals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from piflow.train import _resume_command
from piflow.training.engine import await_lock
from piflow.training.errors import Interrupted, TrainingError
from piflow.training.launch import _describe, launch_module
from piflow.training.signals import STOP_SIGNALS, raise_on_stop, ranks_below


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_passes_every_except_exception(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def library_call() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except Exception:
            pytest.fail("swallowed")
        finally:
            cleaned.append(True)

    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught, raise_on_stop():
        library_call()
    assert caught.value.exit_code == 128 + number
    assert cleaned
    assert signal.getsignal(number) is before


def test_a_stale_lock_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    await_lock(lock)
    lock.touch()
    os.utime(lock, (time.time() - 700,) * 2)
    with pytest.raises(TrainingError, match=r"lock is 12 minutes old.*Remove this file"):
        await_lock(lock)


def test_a_signal_in_the_first_build_leaves_no_lock(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path / 'run'}\niterations: 1\n")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "piflow.train", str(config)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
        deadline = time.monotonic() + 120
        while not lock.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 143
    assert "piflow.train: stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert not lock.exists()


def test_ranks_are_the_launchers_children_only() -> None:
    """A tree of the launcher's shape: runner, launch.py, rank, data worker of the rank."""
    sleep = "import time; time.sleep(60)"
    spawn = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}, {!r}])".format
    rank = spawn(sleep, "worker")
    launcher = spawn(rank, "rank")
    runner = spawn(launcher, "deepspeed.launcher.launch")
    process = subprocess.Popen([sys.executable, "-c", runner], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not (ranks := ranks_below(process.pid)) or not ranks[0].children():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [found.cmdline()[-1] for found in ranks] == ["rank"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_an_early_signal_ends_the_launcher() -> None:
    """No rank is there yet to take it."""
    timer = f"import os, signal, time; time.sleep({0.3}); os.kill({os.getpid()}, signal.SIGINT)"
    start = time.monotonic()
    killer = subprocess.Popen([sys.executable, "-c", timer])
    with pytest.raises(Interrupted, match="stopped by SIGINT") as caught:
        launch_module(["tests.training.no_such_module"], 1, on_line=lambda line: None)
    killer.wait()
    assert caught.value.exit_code == 130
    assert time.monotonic() - start < 60


def test_exit_codes_in_words() -> None:
    assert _describe(247) == "lost a process, killed by SIGKILL (the system does that when memory runs out)"
    assert _describe(-15) == "lost a process, killed by SIGTERM"
    assert _describe(3) == "ended with exit code 3"


def test_resume_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    command = _resume_command(Namespace(config="a b.yaml", overrides=["iterations=5"]), 2)
    first, second, launcher, *rest = shlex.split(command)
    assert (first, second) == ("DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=3")
    assert Path(launcher).is_file()
    assert Path(launcher).parent == Path(sys.executable).parent
    assert rest[-6:] == ["--module", "piflow.train", "a b.yaml", "iterations=5", "--resume", "latest"]
