"""Inception against torch-fidelity's, CLIP against transformers' own steps, and files that are not what is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from piflow.evaluation.extractors import (
    Clip,
    as_bytes,
    as_floats,
    digits_extractor,
    inception_extractor,
    pixel_extractor,
)
from piflow.evaluation.inception import load_inception, resize_like_tensorflow
from tests.evaluation.tiny import inception_weights, picture, save_clip

# torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with the weights and the picture of tests.evaluation.tiny
FEATURES = [1.239158, 1.331576, 0.195916, 0.0, 1.696482, 1.064460, 0.176131, 0.298319]
LOGITS = [-0.629230, -1.886090, -2.156131, -2.886667, -2.706211, -0.966635, 1.432920, 2.331103]
NORMS = (27.997709, 67.158592)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(save_clip(tmp_path_factory.mktemp("clip")))


def test_inception_is_torch_fidelitys(weights: Path) -> None:
    found = inception_extractor(weights)(picture(60, 100))
    features, logits = found["features"][0], found["logits"][0]
    assert features[::256].tolist() == pytest.approx(FEATURES, abs=2e-5)
    assert logits[::126].tolist() == pytest.approx(LOGITS, abs=1e-4)
    assert (features.norm().item(), logits.norm().item()) == pytest.approx(NORMS, rel=1e-5)
    assert (features.shape, logits.shape) == ((2048,), (1008,))


def test_inception_takes_any_image(weights: Path, tmp_path: Path) -> None:
    """Greyscale, floating point, and weights in safetensors."""
    save_file(inception_weights(), tmp_path / "weights.safetensors")
    network, sha256 = load_inception(tmp_path / "weights.safetensors")
    assert len(sha256) == 64
    grey = picture(8, 8)[:, :1]
    expected, _ = network(grey.expand(1, 3, 8, 8))
    extractor = inception_extractor(weights)
    assert torch.equal(extractor(as_floats(grey))["features"], expected)
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\), got torch.float32"):
        network(torch.zeros(1, 3, 8, 8))


def test_wrong_weights(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no file .*none.pth .*Wanted is weights-inception-2015-12-05-6726825d.pth"
    ):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.pth does not hold these weights"):
        load_inception(tmp_path / "cut.pth")
    partly = {name: value for name, value in inception_weights().items() if not name.startswith("fc.")}
    save_file(partly, tmp_path / "partly.safetensors")
    with pytest.raises(ValueError, match=r"partly.safetensors holds another network: it lacks fc.weight"):
        load_inception(tmp_path / "partly.safetensors")
    save_file({"linear": torch.zeros(2)} | inception_weights(), tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="has linear, which that network has not"):
        load_inception(tmp_path / "more.safetensors")

    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "was run",)

    torch.save({"fc.weight": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="does not hold these weights"):
        load_inception(tmp_path / "bad.pth")
    assert not (tmp_path / "was run").exists()


def test_tensorflows_resizing() -> None:
    """Pixel i of the result is the image at i H / size; beyond its last pixel it is that."""
    ramp = torch.arange(4.0)[None, None, :, None].expand(1, 1, 4, 2)
    assert resize_like_tensorflow(ramp, 8)[0, 0, :, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resize_like_tensorflow(ramp, 2)[0, 0, :, 0].tolist() == [0, 2]
    same = torch.rand(1, 3, 5, 5)
    assert torch.equal(resize_like_tensorflow(same, 5), same)


def test_bytes_and_floats() -> None:
    whole = torch.arange(256).to(torch.uint8)
    assert torch.equal(as_bytes(as_floats(whole)), whole)
    assert as_bytes(torch.tensor([-1.5, -1, 0.0, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]


def test_digits_and_pixels() -> None:
    images = torch.zeros(3, 1, 8, 8)
    found = digits_extractor()(images)
    assert (found["features"].shape, found["logits"].shape) == ((3, 64), (3, 10))
    assert torch.equal(pixel_extractor()(images)["features"], torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, 8, 8\)"):
        digits_extractor()(torch.zeros(3, 1, 8, 9))


def test_clip_score_is_that_of_the_models_parts(clip: Clip) -> None:
    images, prompts = torch.cat([picture(40, 48), picture(40, 48).flip(2)]), ["a cat", "two dogs"]
    text = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = clip.processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        a = clip.model.get_image_features(**pixels).pooler_output.double()
        b = clip.model.get_text_features(**text).pooler_output.double()
    expected = 100 * torch.nn.functional.cosine_similarity(a, b).clamp(min=0)
    scores = clip.scores(images, prompts)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert clip.scores(images[:1], ["a very long prompt of many letters"]).shape == (1,)  # cut to 16 tokens
    assert torch.allclose(clip.extractor()(images)["features"].double(), a, atol=1e-5)
    with pytest.raises(ValueError, match="2 images need as many prompts, got 1"):
        clip.scores(images, ["a"])


def test_wrong_clip_folders(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"config.json and preprocessor_config.json and tokenizer_config.json not"
    ):
        Clip(tmp_path)
    folder = save_clip(tmp_path / "clip")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="cannot be used"):
        Clip(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be used"):
        Clip(folder)
    (folder / "model.safetensors").write_bytes(whole)
    weights = load_file(folder / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be used: it lacks text_projection.weight"):
        Clip(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json"):
        Clip(folder)
