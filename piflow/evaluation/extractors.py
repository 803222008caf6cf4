"""Networks that see images as features: Inception, the digits classifier, CLIP, or the pixels as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""images (B, C, H, W) -> features (B, D), logits (B, classes) or None."""


@dataclass(frozen=True)
class Extractor:
    """`network` with what identifies it. `classes`: its logits are those of the images' own classes 0, 1, ..."""

    name: str
    network: Network
    settings: dict[str, Any] = field(default_factory=dict)
    classes: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """features (B, D) and, where there are any, logits (B, classes), float32 on the CPU."""
        features, logits = self.network(images)
        found = {"features": features} if logits is None else {"features": features, "logits": logits}
        return {name: value.float().cpu().contiguous() for name, value in found.items()}


def inception_extractor(weights: Path | str, device: str = "cpu") -> Extractor:
    """The 2048 features of FID and the logits of the Inception score; see `load_inception` for the file and errors."""
    from piflow.evaluation.inception import load_inception

    network, sha256 = load_inception(weights)
    network.to(device)
    return Extractor("inception", lambda images: network(rgb(as_bytes(images)).to(device)), {"sha256": sha256})


def digits_extractor(folder: Path | str | None = None, device: str = "cpu") -> Extractor:
    """The 64 features and ten logits of the digits classifier in a folder, by default that of the package."""
    from piflow.digits.classifier import load_classifier

    classifier = load_classifier(folder).to(device)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        features = classifier.features(as_floats(images).to(device))
        return features, classifier.head(features)

    return Extractor("digits", network, {"sha256": _fingerprint(classifier)}, classes=True)


def pixel_extractor() -> Extractor:
    """The pixels themselves, in [-1, 1]: for small images, and for what needs no network."""
    return Extractor("pixels", lambda images: (as_floats(images).flatten(1), None))


class Clip:
    """Images and prompts under a CLIP model of transformers, read from a local folder (weights, tokenizer, processor).

    Raises FileNotFoundError that names what is missing; ValueError for another kind of model.
    """

    def __init__(self, folder: Path | str, device: str = "cpu") -> None:
        from safetensors import SafetensorError
        from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        folder, wanted = Path(folder), "Wanted is a CLIP model as transformers saves it, such as CLIP ViT-L/14."
        needed = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise FileNotFoundError(f"No CLIP model in {folder}: {' and '.join(missing)} not found. {wanted}")
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(f"No CLIP model in {folder}: neither tokenizer.json nor vocab.json found. {wanted}")
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if kind != "clip":
                raise ValueError(f"it is a model of the kind {kind!r}")
            self.model, loaded = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if absent := sorted(loaded["missing_keys"]):  # transformers would leave them random
                raise ValueError(f"it lacks {absent[0]}.")
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"The CLIP model in {folder} cannot be used: {str(error).splitlines()[0]} {wanted}"
            ) from error
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.settings = device, {"sha256": _fingerprint(self.model)}
        self.max_length = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 max(cos, 0) (B,) of the embeddings of images (B, C, H, W) and their prompts (Hessel et al. 2021).

        Longer prompts are cut to the tokens that the model takes.
        """
        if len(prompts) != len(images):
            raise ValueError(f"CLIP score: {len(images)} images need as many prompts, got {len(prompts)}.")
        text = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        output = self.model(
            input_ids=text["input_ids"].to(self.device),
            attention_mask=text["attention_mask"].to(self.device),
            pixel_values=self._pixels(images),
        )
        return 100 * (output.image_embeds.double() * output.text_embeds.double()).sum(dim=1).clamp(min=0).cpu()

    def extractor(self) -> Extractor:
        """The image embeddings, not normalised, as features."""

        def network(images: Tensor) -> tuple[Tensor, None]:
            return self.model.get_image_features(pixel_values=self._pixels(images)).pooler_output, None

        return Extractor("clip", network, self.settings)

    def _pixels(self, images: Tensor) -> Tensor:
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in rgb(as_bytes(images)).cpu()]
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)


def as_bytes(images: Tensor) -> Tensor:
    """uint8 of images in uint8 or, rounded and clamped, in [-1, 1]."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_floats(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of images in uint8 or in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def rgb(images: Tensor) -> Tensor:
    """Three channels of one or three. Raises ValueError for other numbers."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got shape {tuple(images.shape)}.")
    return images.expand(-1, 3, -1, -1)


def _fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
