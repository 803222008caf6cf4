"""The Inception network of FID: Inception v3 as it was released for TensorFlow on 2015-12-05 (1008 classes).

It differs from later Inception v3 in three places: average pooling leaves the padding out of its count, the last block
pools by maximum, and images are resized as TensorFlow 1 did it (corners at whole pixels, no anti-aliasing). Weights
are read from a file in the layout of pytorch-fid and torch-fidelity, which share it; neither package is needed.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SIZE, NUM_FEATURES, NUM_CLASSES = 299, 2048, 1008

Conv = tuple[str, int, int | tuple[int, int], int, int | tuple[int, int]]
"""(name, channels out, kernel, stride, padding)."""
Branch = tuple["Conv | str | tuple[Conv, Conv]", ...]
"""Layers one after another: a convolution, a pooling by name, or two convolutions side by side."""

AVERAGE, MAXIMUM, MAXIMUM_STRIDED = "average", "maximum", "maximum, stride 2"


def _one(name: str, channels: int) -> Conv:
    return name, channels, 1, 1, 0


def _pooled(channels: int, pooling: str = AVERAGE) -> Branch:
    return pooling, _one("branch_pool", channels)


def _with_5x5(pooled: int) -> tuple[Branch, ...]:
    return (
        (_one("branch1x1", 64),),
        (_one("branch5x5_1", 48), ("branch5x5_2", 64, 5, 1, 2)),
        (_one("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)),
        _pooled(pooled),
    )


def _with_7x7(width: int) -> tuple[Branch, ...]:
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return (
        (_one("branch1x1", 192),),
        (_one("branch7x7_1", width), ("branch7x7_2", width, *row), ("branch7x7_3", 192, *column)),
        (
            _one("branch7x7dbl_1", width), ("branch7x7dbl_2", width, *column), ("branch7x7dbl_3", width, *row),
            ("branch7x7dbl_4", width, *column), ("branch7x7dbl_5", 192, *row),
        ),
        _pooled(192),
    )  # fmt: skip


def _with_3x3_split(pooling: str) -> tuple[Branch, ...]:
    def split(name: str) -> tuple[Conv, Conv]:
        return (f"{name}a", 384, (1, 3), 1, (0, 1)), (f"{name}b", 384, (3, 1), 1, (1, 0))

    return (
        (_one("branch1x1", 320),),
        (_one("branch3x3_1", 384), split("branch3x3_2")),
        (_one("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3, 1, 1), split("branch3x3dbl_3")),
        _pooled(192, pooling),
    )


STEM: tuple[Conv | str, ...] = (
    ("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3, 1, 1), MAXIMUM_STRIDED,
    _one("Conv2d_3b_1x1", 80), ("Conv2d_4a_3x3", 192, 3, 1, 0), MAXIMUM_STRIDED,
)  # fmt: skip
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _with_5x5(32),
    "Mixed_5c": _with_5x5(64),
    "Mixed_5d": _with_5x5(64),
    "Mixed_6a": (
        (("branch3x3", 384, 3, 2, 0),),
        (_one("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2, 0)),
        (MAXIMUM_STRIDED,),
    ),
    "Mixed_6b": _with_7x7(128),
    "Mixed_6c": _with_7x7(160),
    "Mixed_6d": _with_7x7(160),
    "Mixed_6e": _with_7x7(192),
    "Mixed_7a": (
        (_one("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2, 0)),
        (
            _one("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
            ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)), ("branch7x7x3_4", 192, 3, 2, 0),
        ),
        (MAXIMUM_STRIDED,),
    ),
    "Mixed_7b": _with_3x3_split(AVERAGE),
    "Mixed_7c": _with_3x3_split(MAXIMUM),
}  # fmt: skip


class InceptionV3(nn.Module):
    """Images (B, 3, H, W) uint8 -> features (B, 2048) of the last pooling, and logits (B, 1008) without the bias.

    The bias is left out of the logits as the Inception score of the ADM protocol does it.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for layer in STEM:
            if not isinstance(layer, str):
                self.add_module(layer[0], _convolution(channels, layer))
                channels = layer[1]
        for name, branches in BLOCKS.items():
            block = _Mixed(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        x = (resize_like_tensorflow(images.to(self.fc.weight.dtype), SIZE) - 128) / 128
        for layer in STEM:
            x = _pool(x, layer) if isinstance(layer, str) else self.get_submodule(layer[0])(x)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def load_inception(path: Path | str) -> tuple[InceptionV3, str]:
    """The network with the weights in a file, safetensors or PyTorch's (read without running what is in it).

    Returns it with the file's SHA-256.

    Raises:
        FileNotFoundError: there is no such file; the message says which one is wanted.
        ValueError: it is damaged, or holds another network.
    """
    path = Path(path)
    wanted = f"Wanted is {WEIGHTS}, a release file of the project torch-fidelity (pytorch-fid's is the same)."
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with the weights of Inception. {wanted}")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        network = InceptionV3()
        found = network.load_state_dict(weights, strict=False)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, TypeError, OSError, AttributeError) as error:
        raise ValueError(f"{path} does not hold these weights: {str(error).splitlines()[0]} {wanted}") from error
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        named = f"lacks {missing[0]}" if missing else f"has {found.unexpected_keys[0]}, which that network has not"
        raise ValueError(f"{path} holds another network: it {named}. {wanted}")
    with path.open("rb") as file:
        return network, hashlib.file_digest(file, "sha256").hexdigest()


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear resizing (B, C, H, W) -> (B, C, size, size): the value of pixel i is taken at i H / size."""
    for dim in (2, 3):
        length = images.shape[dim]
        place = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        below = place.long()
        above = (below + 1).clamp(max=length - 1)
        share = (place - below).to(images.dtype).view(-1, *[1] * (3 - dim))
        images = torch.lerp(images.index_select(dim, below), images.index_select(dim, above), share)
    return images


class _Mixed(nn.Module):
    """Branches side by side, their outputs concatenated."""

    def __init__(self, channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches, self.channels = branches, 0
        for branch in branches:
            width = channels
            for layer in branch:
                if isinstance(layer, str):
                    continue
                pair = layer if isinstance(layer[0], tuple) else (layer,)
                for convolution in pair:
                    self.add_module(convolution[0], _convolution(width, convolution))
                width = sum(convolution[1] for convolution in pair)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(x, branch) for branch in self.branches], dim=1)

    def _branch(self, x: Tensor, branch: Branch) -> Tensor:
        for layer in branch:
            if isinstance(layer, str):
                x = _pool(x, layer)
            elif isinstance(layer[0], tuple):
                x = torch.cat([self.get_submodule(each[0])(x) for each in layer], dim=1)
            else:
                x = self.get_submodule(layer[0])(x)
        return x


class _Convolution(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _convolution(channels: int, layer: Conv) -> _Convolution:
    _, width, kernel, stride, padding = layer
    return _Convolution(nn.Conv2d(channels, width, kernel, stride, padding, bias=False))


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == MAXIMUM_STRIDED:
        return F.max_pool2d(x, 3, stride=2)
    if kind == MAXIMUM:
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
