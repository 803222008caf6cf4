"""Metrics of generated samples as pure functions of tensors; `piflow.evaluation.run` does whole evaluations."""

from piflow.evaluation.endpoint import endpoint_errors, endpoint_mse
from piflow.evaluation.frechet import Moments, frechet_distance, frechet_from_moments
from piflow.evaluation.inception_score import inception_score
from piflow.evaluation.mmd import kid, mmd_squared
from piflow.evaluation.neighbours import coverage, diversity, precision_recall

__all__ = [
    "Moments",
    "coverage",
    "diversity",
    "endpoint_errors",
    "endpoint_mse",
    "frechet_distance",
    "frechet_from_moments",
    "inception_score",
    "kid",
    "mmd_squared",
    "precision_recall",
]
