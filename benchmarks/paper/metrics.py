"""Metrics of samples beside the teacher's, from the same noises and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.digits.classifier import DigitsClassifier, accuracy, extract
from piflow.evaluation import endpoint_mse, frechet_distance


def diversity_within_class(features: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance of two different samples of one class, over classes: features (N, D), labels (N,)."""
    per_class = []
    for label in labels.unique():
        of_class = features[labels == label].double()
        count = len(of_class)
        if count < 2:
            raise ValueError(f"labels: expected at least two samples of every class, got {count} of class {label}")
        per_class.append(torch.cdist(of_class, of_class).sum() / (count * (count - 1)))
    return torch.stack(per_class).mean().item()


@dataclass(frozen=True, eq=False)
class Reference:
    """The teacher's endpoints and their features, and what else they are compared by."""

    x_0: Tensor
    labels: Tensor
    data_features: Tensor
    classifier: DigitsClassifier

    @property
    def features(self) -> Tensor:
        """(N, D) of the teacher's endpoints."""
        return extract(self.classifier, self.x_0)[0]

    def measure(self, x_0: Tensor) -> dict[str, float]:
        """All metrics of samples (n, 1, 8, 8) that started at the reference's first n noises."""
        count = len(x_0)
        reference, labels = self.x_0[:count], self.labels[:count]
        teacher_features = self.features[:count]
        features, predicted = extract(self.classifier, x_0)
        diversity, teacher_diversity = (diversity_within_class(f, labels) for f in (features, teacher_features))
        return {
            "frechet_to_teacher": frechet_distance(features, teacher_features),
            "frechet_to_data": frechet_distance(features, self.data_features),
            "endpoint_mse": endpoint_mse(x_0, reference),
            "accuracy": accuracy(predicted, labels),
            "diversity": diversity / teacher_diversity,
        }
