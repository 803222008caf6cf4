"""How networks are called: class-conditional ones on images, text-to-image ones on packed tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from piflow.models.dit import check_class_labels

Batch = dict[str, Tensor]
Condition = dict[str, Tensor]
"""What a network is told beside state and noise level: class_labels (B,), or prompt_embeds (B, L, D), prompt_mask
(B, L) bool and pooled (B, P)."""


class Calls(Protocol):
    """How teacher and student of one kind take states and conditions. States are (B, C, H, W) or packed (B, T, C p)."""

    @property
    def layout(self) -> Literal["spatial", "packed"]:
        """Of states and policies."""

    def state(self, latents: Tensor) -> Tensor:
        """The state that the networks see of latents (B, C, H, W)."""

    def inputs(self, x_t: Tensor, sigma: Tensor, condition: Condition, size: tuple[int, int]) -> dict[str, Any]:
        """Keyword arguments of teacher and student at a state of latents of `size` (H, W)."""

    def conditions(self, batch: Batch) -> tuple[Condition, Condition]:
        """The condition of a batch, and that of the other branch of guidance, B each. ValueError for a wrong batch."""

    def seq_len(self, x_t: Tensor) -> int | None:
        """The number of image tokens that a dynamic shift depends on."""


@dataclass(frozen=True)
class ClassCalls:
    """DiT: images, class labels, and the null class after the last."""

    num_classes: int
    layout: Literal["spatial", "packed"] = "spatial"

    def state(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    def inputs(self, x_t: Tensor, sigma: Tensor, condition: Condition, size: tuple[int, int]) -> dict[str, Any]:
        """Time in thousandths."""
        return {"hidden_states": x_t, "timestep": 1000 * sigma, "class_labels": condition["class_labels"]}

    def conditions(self, batch: Batch) -> tuple[Condition, Condition]:
        """The labels, and the null class."""
        labels = batch["class_labels"]
        check_class_labels(labels, self.num_classes, null_class=False)
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.num_classes)}

    def seq_len(self, x_t: Tensor) -> None:
        """None: DiT has one image size."""


@dataclass(frozen=True, eq=False)
class TextCalls:
    """Qwen-Image, FLUX.1 and FLUX.2: tokens of `in_channels`, prompts.

    negative: prompt_embeds (L, D), and pooled (P,) for FLUX.1, of the negative prompt of classifier-free guidance; None
    where the teacher has embedded guidance, or none at all.
    """

    kind: str
    in_channels: int
    embedded_guidance: float | None = None
    negative: Condition | None = None
    layout: Literal["spatial", "packed"] = "packed"

    def state(self, latents: Tensor) -> Tensor:
        """(B, T, C p): tokens of 2 x 2 latent pixels with channel index c p + sub-pixel; of one where C is all."""
        side = self._side(latents.shape[1])
        b, c, h, w = latents.shape
        pixels = latents.reshape(b, c, h // side, side, w // side, side)
        return pixels.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // side) * (w // side), c * side * side)

    def _side(self, channels: int) -> int:
        return 1 if channels == self.in_channels else 2

    def inputs(self, x_t: Tensor, sigma: Tensor, condition: Condition, size: tuple[int, int]) -> dict[str, Any]:
        """Noise level as time, positions of the tokens, prompts and embedded guidance."""
        embeds = condition["prompt_embeds"].to(x_t.dtype)
        arguments: dict[str, Any] = {"hidden_states": x_t, "timestep": sigma, "encoder_hidden_states": embeds}
        if self.embedded_guidance is not None:
            arguments["guidance"] = torch.full_like(sigma, self.embedded_guidance)
        rows, columns = self._grid(x_t, size)
        if self.kind == "qwen_image":
            arguments["encoder_hidden_states_mask"] = condition["prompt_mask"]
            return arguments | {"img_shapes": [[(1, rows, columns)]] * len(x_t)}
        if self.kind == "flux":
            arguments["pooled_projections"] = condition["pooled"].to(x_t.dtype)
        axes = 3 if self.kind == "flux" else 4
        image = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
        text = torch.zeros(embeds.shape[1], axes)
        if self.kind == "flux2":
            text[:, -1] = torch.arange(len(text))
        ids = {"img_ids": F.pad(image, (1, axes - 3)), "txt_ids": text}
        return arguments | {name: value.to(x_t.device) for name, value in ids.items()}

    def _grid(self, x_t: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        side = round((size[0] * size[1] / x_t.shape[1]) ** 0.5)
        return size[0] // side, size[1] // side

    def conditions(self, batch: Batch) -> tuple[Condition, Condition]:
        """The prompts, and the negative prompt for each; without one the prompts again."""
        names = ("prompt_embeds", "prompt_mask", "pooled")
        positive = {name: batch[name] for name in names if name in batch}
        embeds = positive["prompt_embeds"]
        positive.setdefault("prompt_mask", embeds.new_ones(embeds.shape[:2], dtype=torch.bool))
        if self.negative is None:
            return positive, positive
        negative = {name: value.expand(len(embeds), *value.shape).to(embeds) for name, value in self.negative.items()}
        negative["prompt_mask"] = embeds.new_ones(negative["prompt_embeds"].shape[:2], dtype=torch.bool)
        return positive, negative

    def seq_len(self, x_t: Tensor) -> int:
        """T."""
        return x_t.shape[1]


def as_batch(loaded: Any) -> Batch:
    """A batch by name, of a loader that yields (images, labels) too."""
    return loaded if isinstance(loaded, dict) else dict(zip(("latents", "class_labels"), loaded))


def joined(first: Condition, second: Condition) -> Condition:
    """Both conditions in one, 2 B samples; the shorter prompts are padded with zeros, which the mask tells."""
    whole = {}
    for name, a in first.items():
        b = second[name]
        if name != "class_labels" and a.dim() > 1 and name != "pooled" and a.shape[1] != b.shape[1]:
            length = max(a.shape[1], b.shape[1])
            a, b = (F.pad(x, [0, 0] * (x.dim() - 2) + [0, length - x.shape[1]]) for x in (a, b))
        whole[name] = torch.cat([a, b])
    return whole


def select(condition: Condition, index: Tensor) -> Condition:
    """The samples of a condition at `index` (N,)."""
    return {name: value[index] for name, value in condition.items()}
