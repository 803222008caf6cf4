"""Where images come from: folders, files of tensors. Each source gives any stretch of its images, in a fixed order."""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

DIGITS_DATA = "digits:data"
ARRAYS = (".npz", ".npy", ".safetensors", ".pt", ".pth")
LARGEST = 8.0  # images in [-1, 1] may overshoot, but not so far
GREY = ("1", "L")
BROKEN = (
    SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, EOFError, IndexError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What readers raise for files that are damaged or hold something else."""


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W), uint8 or floating point in [-1, 1], and what is known of them.

    groups: (B,) int64, the class or the number of the prompt. latents: (B, c, h, w), what the images were decoded from.
    """

    images: Tensor
    groups: Tensor | None = None
    prompts: Sequence[str] | None = None
    latents: Tensor | None = None


class Source(Protocol):
    """Images 0..count - 1; `settings` are all that decides them, in JSON's terms. `name` is for people."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def batch(self, start: int, stop: int) -> Batch:
        """Images start..stop - 1, always the same. Raises ValueError or OSError that names what cannot be used."""
        ...


class FolderSource:
    """The image files below a folder, numbers in their names in numerical order; with `classes`, one folder per class.

    By default that is so where there are folders and no image lies beside them. Classes are 0, 1, ... in the order of
    their names, or the names themselves where all are numbers. Greyscale stays so where every image is.
    """

    def __init__(self, folder: Path | str, classes: bool | None = None) -> None:
        from piflow.data.latents import SUFFIXES, find_images

        folder = Path(folder)
        if classes is None and folder.is_dir():
            inside = list(folder.iterdir())
            lies_here = any(path.suffix.lower() in SUFFIXES for path in inside)
            classes = not lies_here and any(path.is_dir() for path in inside)
        found = find_images(folder, bool(classes))
        order = sorted(range(len(found.paths)), key=lambda n: _natural(found.paths[n].relative_to(folder)))
        self.name, self.count = str(folder), len(order)
        self._paths = [found.paths[n] for n in order]
        self._labels = None
        if found.labels is not None:
            numbered = all(name.isdecimal() for name in found.classes)
            numbers = [int(name) if numbered else n for n, name in enumerate(found.classes)]
            self._labels = torch.tensor([numbers[found.labels[n]] for n in order])
        with _image(self._paths[0]) as image:
            self._size = image.size
        self._mode = "L" if all(_is_grey(path) for path in self._paths) else "RGB"
        files = [[str(path.relative_to(folder)), *stamp(path)] for path in self._paths]
        self.settings = {"kind": "folder", "folder": str(folder.resolve()), "classes": found.classes, "files": files}

    def batch(self, start: int, stop: int) -> Batch:
        images = torch.stack([self._load(path) for path in self._paths[start:stop]])
        return Batch(images, None if self._labels is None else self._labels[start:stop])

    def _load(self, path: Path) -> Tensor:
        with _image(path) as image:
            if image.size != self._size:
                (width, height), (first_width, first_height) = image.size, self._size
                raise ValueError(
                    f"{path} has {width} x {height} pixels, {self._paths[0].name} before it {first_width} x "
                    f"{first_height}: bring all images of a set to one size first."
                )
            try:
                pixels = np.array(image.convert(self._mode))
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


class ArraySource:
    """The images of a file, read stretch by stretch from where it lies.

    .npz as the ADM evaluations write it (`arr_0` (N, H, W, C) uint8, labels in `arr_1`, if any), .npy, .safetensors and
    .pt (read without running what is in it): one array of images, or `images` beside `labels`. uint8, or floating point
    in [-1, 1]; (N, C, H, W) or (N, H, W, C) with 1 or 3 channels. A compressed .npz and a .pt are read whole.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        try:
            self._read, shape, self._labels = _opened(path)
        except BROKEN as error:
            raise _unreadable(path, error) from error
        if len(shape) != 4 or not (shape[1] in (1, 3) or shape[3] in (1, 3)):
            raise ValueError(f"{path}: expected images (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, got {shape}.")
        if self._labels is not None and self._labels.shape != shape[:1]:
            raise ValueError(f"{path}: expected labels ({shape[0]},), got {tuple(self._labels.shape)}.")
        if shape[0] == 0:
            raise ValueError(f"{path} holds no image.")
        self._channels_last = shape[1] not in (1, 3)
        self.name, self.count = str(path), int(shape[0])
        self.settings = {"kind": "file", "file": [str(path.resolve()), *stamp(path)]}

    def batch(self, start: int, stop: int) -> Batch:
        images = self._read(start, stop)
        if self._channels_last:
            images = images.permute(0, 3, 1, 2)
        return Batch(images.contiguous(), None if self._labels is None else self._labels[start:stop])


class TensorSource:
    """Images (N, C, H, W) in memory, uint8 or floating point in [-1, 1], with their classes (N,), if any."""

    def __init__(self, name: str, images: Tensor, groups: Tensor | None = None) -> None:
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(f"{name}: expected images (N, C, H, W), got shape {tuple(images.shape)}.")
        if groups is not None and groups.shape != images.shape[:1]:
            raise ValueError(f"{name}: expected groups ({len(images)},), got {tuple(groups.shape)}.")
        self.name, self.count = name, len(images)
        self._images, self._groups = images.detach().cpu(), None if groups is None else groups.cpu()
        digest = hashlib.sha256(self._images.contiguous().view(torch.uint8).numpy().tobytes())
        if self._groups is not None:
            digest.update(self._groups.long().contiguous().numpy().tobytes())
        shape = list(images.shape)
        self.settings = {"kind": "tensor", "shape": shape, "dtype": str(images.dtype), "sha256": digest.hexdigest()}

    def batch(self, start: int, stop: int) -> Batch:
        return Batch(self._images[start:stop], None if self._groups is None else self._groups[start:stop])


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of a reference batch's Inception features, which ADM's files hold ready."""

    mean: Tensor
    covariance: Tensor


def open_source(path: str) -> Source:
    """The images in a folder or file, or those of scikit-learn's digits ("digits:data").

    Raises FileNotFoundError or ValueError that says what cannot be used.
    """
    if path == DIGITS_DATA:
        from piflow.digits.data import load_digits_images

        return TensorSource(path, *load_digits_images())
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file or folder {path} (looked from {Path.cwd()}).")
    if Path(path).is_dir():
        return FolderSource(path)
    if Path(path).suffix in ARRAYS:
        return ArraySource(path)
    raise ValueError(f"{path} is neither a folder of images nor a file of them ({', '.join(ARRAYS)}).")


def read_statistics(path: Path | str) -> Statistics | None:
    """`mu` (D,) and `sigma` (D, D) of an .npz; None for other files, and for one that has none.

    Raises ValueError where they are damaged or have other shapes.
    """
    if not zipfile.is_zipfile(path) or Path(path).suffix != ".npz":
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mean, covariance = (torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in ("mu", "sigma"))
    except BROKEN as error:
        raise _unreadable(path, error) from error
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = tuple(mean.shape), tuple(covariance.shape)
        raise ValueError(f"{path}: expected mu (D,) and sigma (D, D), got {shapes[0]} and {shapes[1]}.")
    return Statistics(mean, covariance)


def stamp(path: Path) -> list[int]:
    """Size in bytes, and times of change of content and of the file itself, in nanoseconds.

    The last one is not carried along when files are copied or unpacked, so it tells apart what the others do not.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def check_images(name: str, start: int, images: Tensor) -> None:
    """Raise ValueError, naming the source and the place, for images that are not finite or far outside [-1, 1]."""
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected images in uint8 or floating point, got {images.dtype}.")
    wrong = (~images.isfinite()).flatten(1).any(dim=1).nonzero()
    if len(wrong):
        raise ValueError(
            f"{name} has NaN or infinity in {len(wrong)} of {len(images)} images, first in image "
            f"{start + int(wrong[0])}."
        )
    if images.abs().max() > LARGEST:
        raise ValueError(
            f"{name}: floating-point images must lie in [-1, 1], found {images.abs().max().item():.4g}. "
            "Divide by 127.5 and subtract 1, or give them in uint8."
        )


def _opened(path: Path) -> tuple[Callable[[int, int], Tensor], tuple[int, ...], Tensor | None]:
    """(start, stop) -> images, the shape of all, and labels."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} (looked from {Path.cwd()}).")
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".npy":
        return _of_array(np.load(path, mmap_mode="r", allow_pickle=False), None)
    if path.suffix == ".safetensors":
        file = safe_open(path, "pt")
        names = list(file.keys())
        piece = file.get_slice(_only("images", names))
        labels = file.get_tensor("labels") if "labels" in names else None
        return (lambda start, stop: piece[start:stop]), tuple(piece.get_shape()), _whole(labels)
    content = torch.load(path, "cpu", weights_only=True)
    if isinstance(content, dict):
        images, labels = content[_only("images", list(content))], content.get("labels")
    else:
        images, labels = content, None
    if not isinstance(images, Tensor):
        raise ValueError(f"expected a tensor of images, got {type(images).__name__}.")
    return (lambda start, stop: images[start:stop]), tuple(images.shape), _whole(labels)


def _npz(path: Path) -> tuple[Callable[[int, int], Tensor], tuple[int, ...], Tensor | None]:
    with np.load(path, allow_pickle=False) as file:
        names = list(file.files)
        images = "arr_0" if "arr_0" in names else _only("images", names)
        label = next((name for name in ("labels", "arr_1") if name in names), None)
        labels = None if label is None else file[label]
    return _of_array(_member(path, f"{images}.npy"), _whole(labels))


def _member(path: Path, member: str) -> np.ndarray:
    """An array of an .npz, mapped into memory where it is not compressed: such files are larger than that."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)
            length = stream.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with np.load(path, allow_pickle=False) as file:
            return file[member.removesuffix(".npy")]
    with path.open("rb") as raw:  # a local header of 30 bytes, whose last two numbers are lengths of what follows
        raw.seek(info.header_offset + 26)
        name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
    return np.memmap(path, dtype, "r", info.header_offset + 30 + name + extra + length, shape)


def _of_array(
    array: np.ndarray, labels: Tensor | None
) -> tuple[Callable[[int, int], Tensor], tuple[int, ...], Tensor | None]:
    return (lambda start, stop: torch.from_numpy(np.array(array[start:stop]))), tuple(array.shape), labels


def _only(name: str, names: list[str]) -> str:
    """`name`, or the only name there is."""
    if name in names or len(names) == 1:
        return name if name in names else names[0]
    raise ValueError(f"it has no {name!r} but {sorted(names)}.")


def _whole(labels: Any) -> Tensor | None:
    """int64 of what a file has as labels, if any."""
    try:
        return None if labels is None else torch.as_tensor(labels).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError("its labels are no whole numbers.") from error


def _unreadable(path: Path | str, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}")


def _image(path: Path) -> Image.Image:
    """An opened image of 8 bits; ValueError that names the file for others."""
    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that can be read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    if image.mode.startswith(("I", "F")):  # Pillow's conversion makes all above 255 white
        image.close()
        raise ValueError(f"{path} has more than 8 bits a channel: convert such images to 8 bits first.")
    return image


def _is_grey(path: Path) -> bool:
    with _image(path) as image:
        return image.mode in GREY


def _natural(path: Path) -> list[list[str | int]]:
    """A key that sorts 2.png before 10.png."""
    return [[int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", part)] for part in path.parts]
