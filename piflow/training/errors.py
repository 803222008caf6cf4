"""Errors that end a training run with one message: what was wrong, where, what to do."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and how to help. Raised on every rank alike, printed by rank 0."""

    exit_code = 1


class ConfigError(TrainingError):
    """A configuration file or override that cannot be used."""

    exit_code = 2


class CheckpointError(TrainingError):
    """A checkpoint that is missing, incomplete or does not fit this run."""

    exit_code = 3


class Interrupted(TrainingError):
    """A run that a signal stopped; the exit code is 128 + its number, as a shell has it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
