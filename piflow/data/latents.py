"""Images through a VAE, into shards: `piflow cache-latents`.

A sample is `mean` and `std` (C, h, w) of the VAE's posterior, in the space in which the network works (shifted and
scaled as diffusers' pipelines do it), and `class_labels` () int64 where the images have classes. With `flip`, the
mirrored image follows each image as a sample of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoModel
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from piflow.data.shards import Plan, Sample, ShardWriter

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
OnCorrupt = Literal["fatal", "skip"]


@dataclass(frozen=True)
class Images:
    """Files, the place (row, from 0) of each in its source, and their labels 0..len(classes) - 1, if any."""

    paths: list[Path]
    places: list[int]
    labels: list[int] | None
    classes: list[str]

    @property
    def sha256(self) -> str:
        """Changes with the names, labels or order of the files; a broken one may be replaced in between."""
        names = [[path.parent.name, path.name] for path in self.paths]
        return hashlib.sha256(json.dumps([names, self.places, self.labels]).encode()).hexdigest()


def find_images(source: str | Path, classes: bool = False, key: str = "image") -> Images:
    """The images below a folder, sorted by path, or those that a JSONL file names (`key`, relative to the file).

    classes: the folder holds one folder per class, ImageNet's layout; labels follow their sorted names.
    Raises FileNotFoundError, or ValueError where there are none.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"There is no file or folder {source} (looked from {Path.cwd()}).")
    if source.is_file():
        if classes:
            raise ValueError(f"{source} is a file: --classes imagenet-folder needs a folder with one folder per class.")
        return _listed(source, key)
    if not classes:
        paths = _images_below(source)
        if not paths:
            raise ValueError(f"{source} holds no image ({', '.join(sorted(SUFFIXES))}).")
        return Images(paths, list(range(len(paths))), None, [])
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [_images_below(folder) for folder in folders]
    paths = [path for group in found for path in group]
    if not paths:
        raise ValueError(f"{source} holds no folder with images, one per class, such as n01440764/x.JPEG.")
    labels = [label for label, group in enumerate(found) for _ in group]
    return Images(paths, list(range(len(paths))), labels, [folder.name for folder in folders])


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _listed(source: Path, key: str) -> Images:
    from piflow.data.prompts import read_prompts

    rows = read_prompts(str(source), key)
    paths = [source.parent / text for text in rows.texts]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{source} names {len(missing)} files that do not exist, first {missing[0]}.")
    return Images(paths, rows.places, None, [])


def load_image(path: Path, size: int) -> Tensor:
    """(3, size, size) float32 in [-1, 1]: turned as its camera says, cropped to the middle square and resized.

    Raises ValueError that names the file where it is no whole image.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(_eight_bits(image).convert("RGB"))
            fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that can be read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits of grey the upper 8: Pillow's own conversion makes all above 255 white."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).clip(0, 65535) // 256
    eight = Image.fromarray(levels.astype(np.uint8))
    eight.info = image.info  # which way it was held
    return eight


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A VAE from its folder or repository, or from the folder of a pipeline. ValueError for a class not in SPACES."""
    subfolder = {"subfolder": "vae"} if (Path(path) / "model_index.json").is_file() else {}
    vae = AutoModel.from_pretrained(str(path), dtype=dtype, **subfolder).eval()
    if type(vae).__name__ not in SPACES:
        raise ValueError(f"{path} is a {type(vae).__name__}; images can be encoded with {', '.join(SPACES)}.")
    return vae


class LatentEncoder:
    """The VAE of `load_vae`, with the scaling of its pipeline."""

    def __init__(self, vae: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.vae = load_vae(vae, dtype).to(device)
        self.name, self.dtype, self.device = type(self.vae).__name__, dtype, torch.device(device)
        self.downscale = _downscale(self.vae)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) float32 on the CPU, for images (B, 3, H, W) in [-1, 1]."""
        images = images.to(self.device, self.dtype)
        video = self.name == "AutoencoderKLQwenImage"  # it takes frames (B, C, T, H, W)
        posterior = self.vae.encode(images[:, :, None] if video else images).latent_dist
        mean, std = (t.float()[:, :, 0] if video else t.float() for t in (posterior.mean, posterior.std))
        mean, std = SPACES[self.name](self.vae, mean, std)
        return mean.cpu(), std.cpu()


def _downscale(vae: Any) -> int:
    """Pixels a side for each latent."""
    if type(vae).__name__ == "AutoencoderKLQwenImage":
        return 2 ** len(vae.config.temperal_downsample)
    patch = 2 if type(vae).__name__ == "AutoencoderKLFlux2" else 1
    return int(patch * 2 ** (len(vae.config.block_out_channels) - 1))


def _scalar_space(vae: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor, std * vae.config.scaling_factor


def _channel_space(vae: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    shift, scale = _channel_statistics(vae, mean)
    return (mean - shift) / scale, std / scale


def _channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        like.new_tensor(vae.config.latents_mean)[:, None, None],
        like.new_tensor(vae.config.latents_std)[:, None, None],
    )


def _patch_space(vae: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """FLUX.2 works on 2x2 patches, (B, 4 C, h/2, w/2), channel index (c, ph, pw), normalised by their statistics."""
    shift, scale = _patch_statistics(vae)
    mean, std = (torch.nn.functional.pixel_unshuffle(t, 2) for t in (mean, std))
    return (mean - shift) / scale, std / scale


def _patch_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    scale = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean.float()[:, None, None], scale[:, None, None]


SPACES = {
    "AutoencoderKL": _scalar_space,
    "AutoencoderKLQwenImage": _channel_space,
    "AutoencoderKLFlux2": _patch_space,
}


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) float32, about [-1, 1], of latents in the network's space: the inverse of LatentEncoder."""
    latents = latents.to(vae.device, torch.float32)
    name = type(vae).__name__
    if name == "AutoencoderKL":
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    elif name == "AutoencoderKLQwenImage":
        shift, scale = _channel_statistics(vae, latents)
        latents = (latents * scale + shift)[:, :, None]
    else:
        shift, scale = _patch_statistics(vae)
        latents = torch.nn.functional.pixel_shuffle(latents * scale + shift, 2)
    images = vae.decode(latents.to(vae.dtype)).sample.float()
    return images[:, :, 0] if name == "AutoencoderKLQwenImage" else images


def plan_latents(images: Images, encoder: LatentEncoder, vae: str, shard_size: int, size: int, **more: Any) -> Plan:
    """What the shards will hold; `more`: further settings that change the latents.

    Raises ValueError for a size that is no whole number of latents.
    """
    if size % encoder.downscale:
        below = size - size % encoder.downscale
        raise ValueError(
            f"--size {size} is no whole number of latents: this {encoder.name} has one for {encoder.downscale} pixels. "
            f"The nearest are {max(below, encoder.downscale)} and {below + encoder.downscale}."
        )
    settings = {
        "vae": vae,
        "vae_class": encoder.name,
        "size": size,
        "num_classes": len(images.classes),
        "classes": images.classes,
        "source_sha256": images.sha256,
        **more,
    }
    return Plan(kind="latents", items=len(images.paths), shard_size=shard_size, settings=settings)


def write_latents(
    writer: ShardWriter,
    pending: Iterable[int],
    images: Images,
    encoder: LatentEncoder,
    *,
    batch_size: int,
    flip: bool = False,
    store: torch.dtype = torch.float32,
    on_corrupt: OnCorrupt = "fatal",
) -> Iterator[tuple[int, list[str]]]:
    """Write the `pending` shards; yields (images done, what was wrong with those left out), batch by batch.

    Raises ValueError that names a file which is no whole image, unless `on_corrupt` is "skip".
    """
    size = writer.plan.settings["size"]
    for number in pending:
        samples: list[tuple[int, Sample]] = []
        items = writer.items(number)
        for start in range(items.start, items.stop, batch_size):
            batch = range(start, min(start + batch_size, items.stop))
            pictures, problems = _load(images, batch, size, on_corrupt)
            if pictures:
                stacked = torch.stack(list(pictures.values()))
                encoded = [encoder(turned) for turned in ([stacked, stacked.flip(-1)] if flip else [stacked])]
                for row, item in enumerate(pictures):
                    label = {} if images.labels is None else {"class_labels": torch.tensor(images.labels[item])}
                    samples += [
                        (images.places[item], {"mean": mean[row].to(store), "std": std[row].to(store), **label})
                        for mean, std in encoded
                    ]
            if batch.stop < items.stop:
                yield len(batch), problems
        writer.write(number, samples)
        yield len(batch), problems


def _load(
    images: Images, items: Sequence[int], size: int, on_corrupt: OnCorrupt
) -> tuple[dict[int, Tensor], list[str]]:
    pictures, problems = {}, []
    for item in items:
        try:
            pictures[item] = load_image(images.paths[item], size)
        except ValueError as error:
            if on_corrupt == "fatal":
                raise ValueError(f"{error}. Replace it, or leave out such files with --on-corrupt skip.") from error
            problems.append(str(error))
    return pictures, problems
