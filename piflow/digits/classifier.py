"""A small convolutional classifier of the digits: its accuracy and its features measure the samples.

Train it in seconds with `python -m piflow.digits.classifier --out DIR`. The weights in `weights/classifier` came out of
that command with its defaults; they are shipped so that Fréchet distances compare between machines.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from piflow.digits.data import IMAGE_SHAPE, NUM_CLASSES, check_labels, load_digits_images, split_indices
from piflow.digits.folders import make_folder

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "classifier"
NUM_FEATURES = 64


@dataclass(frozen=True)
class ClassifierRecipe:
    """Everything that decides the classifier's weights; a fifth of the digits is held out, chosen by `split_seed`."""

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    held_out_fraction: float = 0.2
    split_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class DigitsClassifier(nn.Module):
    """Images (B, 1, 8, 8) in [-1, 1] -> logits (B, 10); `features` gives the (B, 64) that enter the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 2 * 2, NUM_FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        if images.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"images must have shape (B, 1, 8, 8), got {tuple(images.shape)}.")
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@torch.no_grad()
def extract(classifier: DigitsClassifier, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features (B, 64) and predicted classes (B,) of images (B, 1, 8, 8), in batches."""
    features = torch.cat([classifier.features(batch) for batch in images.split(batch_size)])
    return features, classifier.head(features).argmax(dim=1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The fraction of predicted classes (B,) that equal the labels (B,)."""
    check_labels(labels)
    if predicted.shape != labels.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} and labels {tuple(labels.shape)} must have one shape.")
    return (predicted == labels).double().mean().item()


def train_classifier(recipe: ClassifierRecipe | None = None) -> tuple[DigitsClassifier, float]:
    """Train by the recipe; returns the network in evaluation mode and its accuracy on the held-out digits.

    Raises:
        ValueError: the recipe leaves no digits to train on, or none held out.
        FloatingPointError: the loss, also that on the held-out digits at the end, is not finite.
    """
    recipe = recipe or ClassifierRecipe()
    images, labels = load_digits_images()
    train, held_out = split_indices(len(images), recipe.held_out_fraction, recipe.split_seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):  # module initialisation draws from the global generator
        torch.manual_seed(recipe.seed)
        classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches_per_epoch = -(-len(train) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * batches_per_epoch)

    def loss_on(index: Tensor) -> Tensor:
        loss = F.cross_entropy(classifier(images[index]), labels[index])
        if not loss.isfinite():
            raise FloatingPointError(f"The classifier's loss is {loss.item()}: lower learning_rate.")
        return loss

    for _ in range(recipe.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for index in order.split(recipe.batch_size):
            optimizer.zero_grad()
            loss_on(index).backward()
            optimizer.step()
            schedule.step()
    classifier.eval().requires_grad_(False)
    loss_on(held_out)
    return classifier, accuracy(extract(classifier, images[held_out])[1], labels[held_out])


def save_classifier(
    classifier: DigitsClassifier, recipe: ClassifierRecipe, held_out_accuracy: float, out: Path
) -> None:
    """Write classifier.safetensors and recipe.json into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), out / "classifier.safetensors")
    account = {
        "command": "python -m piflow.digits.classifier",
        "recipe": asdict(recipe),
        "held_out_accuracy": held_out_accuracy,
        "versions": {name: version(name) for name in ("torch", "scikit-learn", "numpy")},
    }
    (out / "recipe.json").write_text(json.dumps(account, indent=2) + "\n")


def load_classifier(path: Path | str | None = None) -> DigitsClassifier:
    """The classifier in a folder written by the training command (default: the one shipped), in evaluation mode.

    Raises:
        FileNotFoundError: no classifier there; ValueError: the file is damaged. Both say how to make a new one.
    """
    folder = SHIPPED_WEIGHTS if path is None else Path(path)
    remedy = f"Train one: python -m piflow.digits.classifier --out {folder}"
    file = folder / "classifier.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"No digits classifier at {file}. {remedy}")
    classifier = DigitsClassifier()
    try:
        classifier.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"The digits classifier at {file} cannot be read ({error}). {remedy}") from error
    return classifier.eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m piflow.digits.classifier", description="Train the classifier.")
    parser.add_argument("--out", type=Path, required=True, help="folder for classifier.safetensors and recipe.json")
    for field in fields(ClassifierRecipe):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    try:
        recipe = ClassifierRecipe(**arguments)
    except ValueError as error:
        parser.error(str(error))
    try:
        make_folder(out)
        classifier, held_out_accuracy = train_classifier(recipe)
        save_classifier(classifier, recipe, held_out_accuracy, out)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"Classifier saved in {out}: accuracy {held_out_accuracy:.4f} on the held-out digits.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
