"""Cached latents are the VAE's posteriors, scaled as the pipelines scale them; broken images are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from piflow.cli import app
from piflow.data import ShardedDataset
from piflow.data.latents import LatentEncoder, find_images, load_image
from tests.pipelines.tiny import flux2_vae, picture, qwen_vae, vae

SIZE = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 2, 0 and 3 images, of several sizes and modes."""
    root = tmp_path / "images"
    for name in ("n02", "n01", "n03"):
        (root / name).mkdir(parents=True)
    (root / "n03" / "deeper").mkdir()
    for number, path in enumerate(["n01/b.png", "n01/a.png", "n03/c.JPEG", "n03/deeper/d.png", "n03/e.png"]):
        image = picture((20 + 7 * number, 24), number)
        (image.convert("L") if number == 4 else image).save(root / path)
    (root / "n01" / "notes.txt").write_text("no image")
    return root


def cache(source: Path, vae_folder: Path, out: Path, *options: str, code: int = 0) -> str:
    arguments = ["cache-latents", str(source), "--vae", str(vae_folder), "--out", str(out), "--size", str(SIZE)]
    result = CliRunner().invoke(app, [*arguments, "--batch-size", "2", "--device", "cpu", *options])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def kl(tmp_path: Path) -> Path:
    vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_classes_means_and_deviations(folder: Path, kl: Path, tmp_path: Path) -> None:
    cache(folder, kl, tmp_path / "out", "--classes", "imagenet-folder", "--shard-size", "3")
    data = ShardedDataset(tmp_path / "out", "latents")
    assert [int(data[i]["class_labels"]) for i in range(len(data))] == [0, 0, 2, 2, 2]
    assert data.index.settings["classes"] == ["n01", "n02", "n03"]
    assert data.index.settings["num_classes"] == 3
    paths = [folder / p for p in ("n01/a.png", "n01/b.png", "n03/c.JPEG", "n03/deeper/d.png", "n03/e.png")]
    for index, path in enumerate(paths):
        with torch.no_grad():
            posterior = vae().encode(load_image(path, SIZE)[None]).latent_dist
        assert data[index]["mean"].shape == (4, 8, 8)
        torch.testing.assert_close(data[index]["mean"], (posterior.mean[0] - 0.1) * 0.7)
        torch.testing.assert_close(data[index]["std"], posterior.std[0] * 0.7)


def test_mirrored_images_follow(folder: Path, kl: Path, tmp_path: Path) -> None:
    cache(folder / "n01", kl, tmp_path / "out", "--flip", "--store-dtype", "float16")
    data = ShardedDataset(tmp_path / "out")
    assert data.sources().tolist() == [0, 0, 1, 1]
    with torch.no_grad():
        mirrored = vae().encode(load_image(folder / "n01" / "b.png", SIZE).flip(-1)[None]).latent_dist.mean[0]
    assert data[3]["mean"].dtype == torch.float16
    assert data[3].keys() == {"mean", "std"}
    torch.testing.assert_close(data[3]["mean"].float(), (mirrored - 0.1) * 0.7, atol=2e-3, rtol=1e-3)


def test_broken_images_end_the_run_or_are_left_out(folder: Path, kl: Path, tmp_path: Path) -> None:
    whole = (folder / "n03" / "c.JPEG").read_bytes()
    (folder / "n03" / "c.JPEG").write_bytes(whole[:-100])
    (folder / "n01" / "a.png").write_bytes(b"")
    out, classes = tmp_path / "out", ("--classes", "imagenet-folder", "--shard-size", "2")
    said = cache(folder, kl, out, *classes, code=1)
    assert f"{folder}/n01/a.png is no image that can be read. Replace it, or leave out such files with" in said
    said = cache(folder, kl, out, *classes, "--on-corrupt", "skip", "--json")
    assert f"left out: {folder}/n03/c.JPEG is damaged: " in said
    summary = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert (summary["left_out"], summary["samples"], summary["complete"]) == (2, 3, True)
    data = ShardedDataset(out)
    assert data.sources().tolist() == [1, 3, 4]
    assert [int(data[i]["class_labels"]) for i in range(3)] == [0, 2, 2]


def test_captioned_images(folder: Path, kl: Path, tmp_path: Path) -> None:
    rows = folder / "rows.jsonl"
    lines = [{"image": "n03/e.png", "prompt": "grey"}, {"image": "", "prompt": "none"}, {"image": "n01/a.png"}]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    cache(rows, kl, tmp_path / "out")
    assert ShardedDataset(tmp_path / "out").sources().tolist() == [0, 2]
    rows.write_text(json.dumps({"image": "n09/none.png"}))
    assert f"names 1 files that do not exist, first {folder}/n09/none.png" in cache(rows, kl, tmp_path / "o", code=1)


def test_empty_sources(folder: Path, kl: Path, tmp_path: Path) -> None:
    assert "There is no file or folder" in cache(tmp_path / "none", kl, tmp_path / "out", code=1)
    assert "holds no image (.bmp, .jpeg, .jpg" in cache(folder / "n02", kl, tmp_path / "out", code=1)
    said = cache(folder / "n01", kl, tmp_path / "out", "--classes", "imagenet-folder", code=1)
    assert "holds no folder with images, one per class" in said
    assert not (tmp_path / "out").exists()


def test_the_middle_square(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (255, 0, 128)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    image = load_image(path, 8)
    assert image.shape == (3, 8, 8)
    torch.testing.assert_close(image[:, 4, 4], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]))
    assert image.std(dim=(1, 2)).max() < 0.1
    turned = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "y.png", exif=exif)
    turned.save(tmp_path / "z.png")
    torch.testing.assert_close(load_image(tmp_path / "y.png", 4), load_image(tmp_path / "z.png", 4).flip(1, 2))


def test_sixteen_bits_of_grey_are_not_white(tmp_path: Path) -> None:
    """Pillow's own conversion cuts all above 255 off."""
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(levels).save(tmp_path / "deep.png", exif=exif)
    Image.fromarray((levels >> 8).astype(np.uint8)).save(tmp_path / "flat.png", exif=exif)
    deep = load_image(tmp_path / "deep.png", 8)
    assert torch.equal(deep, load_image(tmp_path / "flat.png", 8))
    assert deep[0, 0, 0] == 1.0  # upside down
    assert deep[0, -1, -1] == -1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_every_kind_of_pixel(tmp_path: Path, mode: str, orientation: int) -> None:
    """Black left half, white right half; held at the side, the left half is above."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    image = load_image(path, 8)
    dark, light = (image[:, :, :3], image[:, :, 5:]) if orientation == 1 else (image[:, :3], image[:, 5:])
    torch.testing.assert_close(dark, torch.full_like(dark, -1), atol=0.05, rtol=0)
    torch.testing.assert_close(light, torch.full_like(light, 1), atol=0.05, rtol=0)


def test_a_size_that_is_no_whole_number_of_latents(folder: Path, kl: Path, tmp_path: Path) -> None:
    flux2_vae().save_pretrained(tmp_path / "flux2")
    qwen_vae().save_pretrained(tmp_path / "qwen")
    for name, downscale in ((kl, 2), (tmp_path / "flux2", 4), (tmp_path / "qwen", 2)):
        out = tmp_path / "out"
        said = cache(folder, name, out, "--size", str(16 * downscale + 1), code=1)
        assert f"has one for {downscale} pixels. The nearest are {16 * downscale} and {17 * downscale}." in said
        assert not out.exists()
    cache(folder, tmp_path / "flux2", tmp_path / "out", "--size", "20")
    assert ShardedDataset(tmp_path / "out")[0]["mean"].shape[1:] == (5, 5)


def test_a_broken_image_that_was_mended_is_taken_in(folder: Path, kl: Path, tmp_path: Path) -> None:
    broken, out = folder / "n01" / "a.png", tmp_path / "out"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    cache(folder, kl, out, "--flip", "--shard-size", "2", "--on-corrupt", "skip")
    assert len(ShardedDataset(out)) == 8
    assert "0 shards written, 3 kept" in cache(folder, kl, out, "--flip", "--shard-size", "2", "--on-corrupt", "skip")
    assert f"{broken} is" in cache(folder, kl, out, "--flip", "--shard-size", "2", code=1)
    broken.write_bytes(whole)
    assert "1 shards written, 2 kept" in cache(folder, kl, out, "--flip", "--shard-size", "2")
    assert ShardedDataset(out).sources().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "0 shards written, 3 kept" in cache(folder, kl, out, "--flip", "--shard-size", "2")


def test_qwen_and_flux2_latents_are_scaled_as_in_their_pipelines(tmp_path: Path) -> None:
    images = torch.stack([load_image(save(tmp_path, seed), 32) for seed in (0, 1)])
    qwen = qwen_vae()
    qwen.save_pretrained(tmp_path / "qwen")
    mean, std = LatentEncoder(str(tmp_path / "qwen"))(images)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (qwen.config.latents_mean, qwen.config.latents_std))
    with torch.no_grad():
        torch.testing.assert_close(mean * scale + shift, qwen.encode(images[:, :, None]).latent_dist.mean[:, :, 0])
    assert std.shape == mean.shape
    assert (std > 0).all()

    network = flux2_vae()
    nn.init.uniform_(network.bn.running_mean)
    nn.init.uniform_(network.bn.running_var, 0.5, 2)
    network.save_pretrained(tmp_path / "flux2")
    mean, std = LatentEncoder(str(tmp_path / "flux2"))(images)
    pipe = Flux2Pipeline(scheduler=None, vae=network, text_encoder=None, tokenizer=None, transformer=None)
    with torch.no_grad():
        torch.testing.assert_close(mean, pipe._encode_vae_image(images, torch.Generator()))
    assert std.shape == mean.shape


def save(folder: Path, seed: int) -> Path:
    picture((40, 40), seed).save(folder / f"{seed}.png")
    return folder / f"{seed}.png"


def test_other_networks_are_refused(tmp_path: Path) -> None:
    from tests.pipelines.tiny import dit_base

    dit_base().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"is a DiTTransformer2DModel; images can be encoded with AutoencoderKL, "):
        LatentEncoder(str(tmp_path / "dit"))


def test_the_hash_follows_the_files(folder: Path) -> None:
    before = find_images(folder, classes=True).sha256
    (folder / "n01" / "b.png").write_bytes(b"replaced")
    assert before == find_images(folder, classes=True).sha256 != find_images(folder).sha256
    (folder / "n01" / "b.png").unlink()
    assert before != find_images(folder, classes=True).sha256
