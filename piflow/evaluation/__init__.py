"""Metrics of generated samples, as pure functions of tensors."""

from piflow.evaluation.endpoint import endpoint_mse
from piflow.evaluation.frechet import frechet_distance

__all__ = ["endpoint_mse", "frechet_distance"]
