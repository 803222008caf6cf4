"""Folders, files and models as sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from piflow.digits.teacher import euler_sample, load_teacher, teacher_velocity
from piflow.evaluation.models import ModelSource, is_model, noise_seed, open_model
from piflow.evaluation.sources import TensorSource, check_images, open_source, read_statistics
from piflow.models import GMDiTTransformer2DModelV2
from piflow.noise_schedule import NoiseSchedule
from piflow.pipelines import PiDiTPipeline

PIXELS = torch.arange(5 * 3 * 6 * 4).remainder(256).to(torch.uint8).reshape(5, 3, 6, 4)


def save_images(folder: Path, images: torch.Tensor, names: list[str]) -> None:
    for name, image in zip(names, images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / name)


def test_a_folder(tmp_path: Path) -> None:
    save_images(tmp_path, PIXELS, [f"{n}.png" for n in range(5)])
    source = open_source(str(tmp_path))
    assert source.count == 5
    batch = source.batch(1, 3)
    assert torch.equal(batch.images, PIXELS[1:3])
    assert batch.groups is None


def test_a_folder_of_classes_and_of_greyscale(tmp_path: Path) -> None:
    save_images(tmp_path, PIXELS[:, :1], ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"])
    batch = open_source(str(tmp_path)).batch(0, 5)
    assert torch.equal(batch.images, PIXELS[:, :1])
    assert batch.groups.tolist() == [0, 0, 1, 1, 1]


def test_one_grey_image_takes_no_colour_from_the_others(tmp_path: Path) -> None:
    save_images(tmp_path, PIXELS[:1, :1], ["0.png"])
    save_images(tmp_path, PIXELS[1:], ["1.png", "2.png"])
    images = open_source(str(tmp_path)).batch(0, 3).images
    assert torch.equal(images, torch.cat([PIXELS[:1, :1].expand(1, 3, 6, 4), PIXELS[1:3]]))


def test_numbers_in_names_are_numbers(tmp_path: Path) -> None:
    """The order in which they were made, and the classes that they name."""
    save_images(tmp_path / "x", PIXELS, ["0.png", "1.png", "2.png", "10.png", "11.png"])
    assert torch.equal(open_source(str(tmp_path / "x")).batch(0, 5).images, PIXELS)
    save_images(tmp_path / "y", PIXELS, ["3/a2.png", "3/a10.png", "7/0.png", "10/0.png", "10/1.png"])
    batch = open_source(str(tmp_path / "y")).batch(0, 5)
    assert torch.equal(batch.images, PIXELS)
    assert batch.groups.tolist() == [3, 3, 7, 10, 10]


def test_images_that_pillow_would_spoil_or_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0.png has more than 8 bits a channel"):
        open_source(str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"0.png is too large: Image size \(64 pixels\) exceeds limit"):
        open_source(str(tmp_path))


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no image \(.bmp"):
        open_source(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="holds no folder with images"):
        open_source(str(tmp_path))
    save_images(tmp_path, PIXELS, ["0.png", "1.png", "3.png", "4.png"])
    Image.new("RGB", (5, 6)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2.png has 5 x 6 pixels, 0.png before it 4 x 6"):
        open_source(str(tmp_path)).batch(0, 5)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"2.png"):
        open_source(str(tmp_path)).batch(0, 5)
    (tmp_path / "2.png").write_text("text")
    with pytest.raises(ValueError, match=r"2.png is no image that can be read"):
        open_source(str(tmp_path)).batch(2, 3)


def test_settings_change_with_the_files(tmp_path: Path) -> None:
    save_images(tmp_path, PIXELS, ["0.png", "1.png"])
    before = open_source(str(tmp_path)).settings
    assert open_source(str(tmp_path)).settings == before
    save_images(tmp_path, PIXELS.flip(0), ["0.png"])
    assert open_source(str(tmp_path)).settings != before


@pytest.mark.parametrize("name", ["x.npz", "small.npz", "x.npy", "x.safetensors", "x.pt", "dict.pt", "v2.npz"])
def test_files(tmp_path: Path, name: str) -> None:
    file, channels_last, labels = tmp_path / name, PIXELS.permute(0, 2, 3, 1).numpy(), np.array([4, 3, 2, 1, 0])
    write = {
        "x.npz": lambda: np.savez(file, channels_last, labels),
        "small.npz": lambda: np.savez_compressed(file, arr_0=channels_last, arr_1=labels),
        "v2.npz": lambda: np.savez(file, images=PIXELS.numpy(), labels=labels),
        "x.npy": lambda: np.save(file, channels_last),
        "x.safetensors": lambda: save_file({"images": PIXELS, "labels": torch.from_numpy(labels)}, file),
        "x.pt": lambda: torch.save(PIXELS, file),
        "dict.pt": lambda: torch.save({"images": PIXELS, "labels": torch.from_numpy(labels)}, file),
    }
    write[name]()
    source = open_source(str(file))
    assert source.count == 5
    assert torch.equal(source.batch(1, 4).images, PIXELS[1:4])
    if name not in ("x.npy", "x.pt"):
        assert source.batch(1, 4).groups.tolist() == [3, 2, 1]
    assert read_statistics(file) is None


def test_an_uncompressed_npz_is_not_read_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", PIXELS.permute(0, 2, 3, 1).numpy())
    source = open_source(str(tmp_path / "x.npz"))
    whole = (tmp_path / "x.npz").read_bytes()
    place = whole.index(PIXELS[4].permute(1, 2, 0).contiguous().numpy().tobytes())
    with (tmp_path / "x.npz").open("r+b") as file:  # what was mapped shows what is written later
        file.seek(place)
        file.write(b"\xff" * 72)
    assert source.batch(4, 5).images.eq(255).all()


def test_statistics_of_a_reference_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.arange(3.0), sigma=np.eye(3), arr_0=PIXELS.permute(0, 2, 3, 1).numpy())
    found = read_statistics(tmp_path / "ref.npz")
    assert found is not None
    assert found.mean.tolist() == [0, 1, 2]
    assert open_source(str(tmp_path / "ref.npz")).count == 5
    whole = (tmp_path / "ref.npz").read_bytes()
    place = whole.index(np.eye(3).tobytes())
    (tmp_path / "cut.npz").write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"cut.npz cannot be read: Bad CRC"):
        read_statistics(tmp_path / "cut.npz")
    np.savez(tmp_path / "flat.npz", mu=np.zeros(3), sigma=np.ones(3))
    with pytest.raises(ValueError, match=r"expected mu \(D,\) and sigma \(D, D\), got \(3,\) and \(3,\)"):
        read_statistics(tmp_path / "flat.npz")


def test_broken_files(tmp_path: Path) -> None:
    cases = {
        "x.npz": (lambda file: file.write_bytes(b"PK\x03\x04"), "x.npz cannot be read"),
        "x.safetensors": (lambda file: file.write_bytes(b"1234"), "x.safetensors cannot be read"),
        "x.pt": (lambda file: torch.save(Path("/"), file), "x.pt cannot be read"),
        "y.pt": (lambda file: torch.save([1], file), "expected a tensor of images, got list"),
        "y.npy": (lambda file: np.save(file, np.zeros((4, 8, 8))), r"\(N, C, H, W\) or \(N, H, W, C\)"),
        "z.npy": (lambda file: np.save(file, np.zeros((0, 3, 8, 8))), "holds no image"),
        "y.safetensors": (
            lambda file: save_file({"a": PIXELS, "b": PIXELS + 1}, file),
            r"has no 'images' but \['a', 'b'\]",
        ),
        "z.npz": (lambda file: np.savez(file, PIXELS.numpy(), np.zeros(3)), r"expected labels \(5,\), got \(3,\)"),
        "names.npz": (
            lambda file: np.savez(file, PIXELS.numpy(), np.array(["a"] * 5)),
            "names.npz cannot be read: its labels are no whole numbers",
        ),
        "list.pt": (
            lambda file: torch.save({"images": PIXELS, "labels": [1]}, file),
            r"expected labels \(5,\), got \(1,\)",
        ),
        "empty.pt": (lambda file: file.write_bytes(b""), "empty.pt cannot be read"),
        "objects.npz": (
            lambda file: np.savez(file, np.array([1, None])),
            "objects.npz cannot be read: Object arrays",
        ),
        "z.txt": (lambda file: file.write_text("x"), "neither a folder of images nor a file of them"),
    }
    for name, (write, message) in cases.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path / name))


def test_images_that_are_none() -> None:
    images = torch.zeros(4, 1, 2, 2)
    check_images("x", 0, images)
    with pytest.raises(ValueError, match=r"x has NaN or infinity in 1 of 4 images, first in image 12"):
        check_images("x", 10, images.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], found 255"):
        check_images("x", 0, images + 255)
    with pytest.raises(ValueError, match=r"uint8 or floating point, got torch.int64"):
        check_images("x", 0, images.long())
    with pytest.raises(ValueError, match=r"expected groups \(4,\), got \(3,\)"):
        TensorSource("x", images, torch.zeros(3))


def test_student_and_teacher_start_from_the_same_noise(tmp_path: Path) -> None:
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2)
    student.save_pretrained(tmp_path)
    assert is_model(str(tmp_path))
    generators = [torch.Generator().manual_seed(noise_seed(3, place)) for place in range(8, 12)]
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    labels = torch.tensor([8, 9, 0, 1])

    source = ModelSource(open_model("digits:teacher"), range(10), 3, 20, {"num_inference_steps": 2})
    batch = source.batch(8, 12)
    expected = euler_sample(teacher_velocity(load_teacher(), labels, 2.0), noise, 2, NoiseSchedule())
    assert torch.equal(batch.images, expected)
    assert torch.equal(batch.groups, labels)
    assert torch.allclose(source.batch(10, 12).images, batch.images[2:], atol=1e-5)

    batch = ModelSource(open_model(str(tmp_path)), range(10), 3, 20, {"num_inference_steps": 1}).batch(8, 12)
    pipe = PiDiTPipeline(student.eval(), vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
    expected = pipe(labels, latents=noise, num_inference_steps=1, output_type="latent").images
    assert torch.equal(batch.latents, expected)
    assert torch.equal(batch.groups, labels)


def test_broken_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model in"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "GMQwenImageTransformer2DModel"}')
    with pytest.raises(ValueError, match="makes no images alone: give the folder of a pipeline"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        open_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ValueError, match="neither piflow nor diffusers has a pipeline 'NoSuchPipeline'"):
        open_model(str(tmp_path))
    (tmp_path / "model_index.json").unlink()
    GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the file of weights lacks some of this GMDiTTransformer2DModelV2's"):
        open_model(str(tmp_path))
    teacher = ModelSource(open_model("digits:teacher"), range(10), 0, 2, {"steps": 1})
    with pytest.raises(ValueError, match=r"takes the arguments .*, got 'steps'"):
        teacher.batch(0, 1)
