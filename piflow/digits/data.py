"""scikit-learn's handwritten digits: 1797 real 8x8 scans of ten classes, bundled with the package (no download)."""

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10
NULL_CLASS = NUM_CLASSES  # the label of the unconditional branch in classifier-free guidance
IMAGE_SHAPE = (1, 8, 8)


def load_digits_images() -> tuple[Tensor, Tensor]:
    """All images (1797, 1, 8, 8) float32 in [-1, 1] (ink is +1) and labels (1797,) int64 in 0..9.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The digits come with scikit-learn, which is not installed: pip install 'piflow[evaluation]'",
            name=error.name,
        ) from error
    digits = load_digits()
    images = torch.from_numpy(np.asarray(digits.images, dtype=np.float32) / 8 - 1)  # pixels are integers 0..16
    return images[:, None], torch.from_numpy(np.asarray(digits.target, dtype=np.int64))


def split_indices(num_samples: int, held_out_fraction: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Disjoint, shuffled indices (train, held out) int64 that cover range(num_samples); fixed by the seed."""
    if not (0 < held_out_fraction < 1 and 0 < (num_held_out := round(num_samples * held_out_fraction)) < num_samples):
        raise ValueError(
            f"held_out_fraction must lie between 0 and 1 and leave some of {num_samples} samples on either side, "
            f"got {held_out_fraction}."
        )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return order[num_held_out:], order[:num_held_out]


def check_labels(labels: Tensor, num_classes: int = NUM_CLASSES) -> None:
    """Raise a ValueError that names the first label outside 0..num_classes-1 and where it stands; labels (B,) int64."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels must be a vector (B,) of integers, got shape {tuple(labels.shape)} and dtype {labels.dtype}."
        )
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        position = int(wrong[0])
        raise ValueError(
            f"Class label {int(labels[position])} (position {position}) is out of range: "
            f"valid labels are 0 to {num_classes - 1}."
        )
