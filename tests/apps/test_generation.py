"""The web demo's pictures are the library's, whoever else is drawing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.apps.places import split_repository
from piflow.apps.sizes import LONGEST_SIDE
from piflow.apps.web.generation import Request, Stopped, draw, reference, sheet
from piflow.apps.web.models import FAMILIES, DigitsModel, Model, load_digits, load_text_model
from piflow.digits.teacher import euler_sample, load_teacher, teacher_velocity
from piflow.noise_schedule import NoiseSchedule
from piflow.pipelines import PiDiTPipeline
from piflow.schedulers import FlowMapSDEScheduler
from tests.apps.tiny_models import save_tiny
from tests.pipelines.tiny import picture

SMALL: dict[str, Any] = {"width": 16, "height": 12, "total_substeps": 32}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    return ours.size == theirs.size and bool((np.asarray(ours) == np.asarray(theirs)).all())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder) for family in FAMILIES}


@pytest.fixture(scope="module")
def models(folders: dict[str, tuple[str, str]]) -> dict[str, Model]:
    text = {
        family: load_text_model(family, *places, device="cpu", dtype=torch.float32)
        for family, places in folders.items()
    }
    return {"digits": load_digits(), **text}


@pytest.fixture(scope="module")
def digits() -> DigitsModel:
    return load_digits()


def test_digits_of_the_student(digits: DigitsModel) -> None:
    request = Request("3 1,4", seed=7, width=32, nfe=3, total_substeps=40, temperature=0.5)
    drawn = draw(digits, "student", request)
    pipe = PiDiTPipeline(digits.networks["student"], vae=None, scheduler=FlowMapSDEScheduler())
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe([3, 1, 4], num_inference_steps=3, total_substeps=40, temperature=0.5, generator=seeded(7)).images
    assert same(drawn.image, sheet(theirs, 32))
    assert drawn.image.size == (3 * 32 + 2 * 2, 32)
    assert drawn.evaluations == 3
    assert drawn.settings | {"piflow": ""} == {
        "class": [3, 1, 4], "seed": 7, "piflow": "", "model": "digits-teacher", "adapter": "student-nfe4", "nfe": 3,
        "total_substeps": 40, "temperature": 0.5, "dtype": "float32", "size": [100, 32],
    }  # fmt: skip


def test_digits_of_the_teacher_take_even_euler_steps(digits: DigitsModel) -> None:
    labels = torch.tensor([3, 1, 4])
    noise = torch.randn(3, 1, 8, 8, generator=seeded(7))
    x_0 = euler_sample(teacher_velocity(load_teacher(), labels, guidance_scale=2.0), noise, 3, NoiseSchedule())
    drawn = draw(digits, "base", Request("314", seed=7, width=8, nfe=3))
    theirs = torch.cat([*((x_0 / 2 + 0.5).clamp(0, 1) * 255)], dim=-1)[0]
    ours = torch.from_numpy(np.asarray(drawn.image).astype(np.float32))
    for label in range(3):  # a gap of one pixel lies between
        torch.testing.assert_close(
            ours[:, 9 * label : 9 * label + 8], theirs[:, 8 * label : 8 * label + 8], atol=1, rtol=0
        )
    assert drawn.evaluations == 6
    assert "total_substeps" not in drawn.settings
    assert drawn.settings["adapter"] is None


@pytest.mark.parametrize("network", ["student", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_image(models: dict[str, Model], folders: Any, family: str, network: Any) -> None:
    """The pipeline as somebody loads and calls it by hand gives the same picture for the same seed."""
    model = models[family]
    drawn = draw(model, network, Request(" a cat ", seed=5, nfe=5, temperature=0.4, **SMALL))
    base, adapter = folders[family]
    pipe = FAMILIES[family].pipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = model.base_arguments
    if network == "student":
        pipe.load_piflow_adapter(adapter)
        arguments = {"total_substeps": 32, "temperature": 0.4}
    theirs = pipe(prompt="a cat", width=16, height=12, num_inference_steps=5, generator=seeded(5), **arguments).images[
        0
    ]
    assert same(drawn.image, theirs)
    assert same(drawn.steps[-1][1], theirs)
    assert [sigma for sigma, _ in drawn.steps] == sorted((sigma for sigma, _ in drawn.steps), reverse=True)
    assert drawn.steps[-1][0] == 0
    assert not same(drawn.steps[0][1], theirs)
    names = (Path(base).name, Path(adapter).name if network == "student" else None)
    assert (drawn.settings["model"], drawn.settings["adapter"]) == names


def test_editing(models: dict[str, Model]) -> None:
    model, references = models["flux2"], [picture((64, 64)), picture((64, 80), seed=1)]
    request = Request("a cat", references=references, **SMALL)
    drawn = draw(model, "student", request)
    with model.using("student") as pipe:
        theirs = pipe(
            prompt="a cat", image=references, width=16, height=12, total_substeps=32, generator=seeded(0)
        ).images[0]
    assert same(drawn.image, theirs)
    assert not same(drawn.image, draw(model, "student", Request("a cat", **SMALL)).image)
    assert drawn.settings["references"] == 2


def test_uploaded_pictures_are_as_people_see_them(tmp_path: Path) -> None:
    """A telephone's pictures lie on their side and say so; colours under full transparency are nobody's choice."""
    upright, exif = picture((64, 80)), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert same(reference(tmp_path / "turned.png"), upright)
    clear = upright.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size))
    clear.save(tmp_path / "clear.png")
    assert same(reference(tmp_path / "clear.png"), Image.new("RGB", clear.size, "white"))
    for mode in ("L", "P", "LA", "1", "CMYK"):
        upright.convert(mode).save(tmp_path / "other.tiff")
        assert reference(tmp_path / "other.tiff").mode == "RGB"


@pytest.mark.parametrize("kind", ["text", "empty", "cut short"])
def test_files_that_are_no_pictures(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    picture((64, 64)).save(path)
    path.write_bytes({"text": b"no picture", "empty": b"", "cut short": path.read_bytes()[:900]}[kind])
    with pytest.raises(ValueError, match=r"^file\.png cannot be read as a picture: take a whole PNG"):
        reference(path)


def test_policies_without_a_mixture_have_no_temperature(tmp_path: Path) -> None:
    model = load_text_model("flux", *save_tiny("flux", tmp_path, "DX"), device="cpu", dtype=torch.float32)
    assert not model.has_temperature
    assert draw(model, "student", Request("a cat", **SMALL)).image.size == (16, 12)


def test_several_at_once(models: dict[str, Model]) -> None:
    """Everybody's picture is what it is alone, though student and base are switched between them."""
    what: dict[str, dict[str, Any]] = {"flux": {"prompt": "a cat", **SMALL}, "digits": {"prompt": "42", "width": 8}}
    asked: list[tuple[str, Any, Request]] = [
        (name, network, Request(**what[name], seed=seed))
        for seed in range(4)
        for name in what
        for network in ("student", "base")
    ]  # fmt: skip
    alone = [draw(models[name], network, request).image for name, network, request in asked]
    assert len({image.tobytes() for image in alone}) == len(alone)
    with ThreadPoolExecutor(8) as people:
        together = list(people.map(lambda each: draw(models[each[0]], *each[1:]).image, asked))
    assert all(same(*pair) for pair in zip(alone, together))


def test_stopping_leaves_no_trace(models: dict[str, Model]) -> None:
    model, request = models["qwen_image"], Request("a cat", **SMALL)
    before, seen = draw(model, "student", request).image, []

    def on_step(done: int, steps: int) -> None:
        seen.append((done, steps))
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        draw(model, "student", request, on_step)
    assert seen == [(0, 4), (1, 4), (2, 4)]
    assert same(draw(model, "student", request).image, before)


def test_without_the_trajectory(digits: DigitsModel) -> None:
    assert draw(digits, "student", Request("1", width=8, trajectory=False)).steps == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("digits", {"prompt": "  "}, "nothing to draw: type digits, such as 31415"),
        ("digits", {"prompt": "3x"}, "draws the digits 0 to 9 and nothing else"),
        ("digits", {"prompt": "²"}, "draws the digits 0 to 9 and nothing else"),
        ("digits", {"prompt": "1" * 21}, "At most 20 digits at a time, got 21"),
        ("digits", {"width": 30}, "Size: 30 is no multiple of 8; next to it are 24 and 32"),
        ("digits", {"width": 0}, "Size: expected a whole number from 8 to 256, got 0"),
        ("digits", {"seed": None}, "Seed is empty: give a whole number from 0"),
        ("digits", {"seed": -1}, "Seed: expected a whole number from 0 to 4294967295, got -1"),
        ("digits", {"seed": 2.7}, "Seed: expected a whole number from 0 to 4294967295, got 2.7"),
        ("digits", {"seed": 2**32}, "Seed: expected a whole number from 0 to 4294967295, got 4294967296"),
        ("digits", {"nfe": 2.5}, "Steps: expected a whole number from 1 to 64, got 2.5"),
        ("digits", {"nfe": float("nan")}, "Steps: expected a whole number"),
        ("digits", {"total_substeps": 0}, "Substeps: expected a whole number from 1"),
        ("flux", {"prompt": "\n"}, "The prompt is empty: say what the picture should show"),
        ("flux", {"width": None}, "Width is empty"),
        ("flux", {"height": 21}, "Height: 21 is no multiple of 4; next to it are 20 and 24"),
        ("flux", {"width": 1e9}, f"Width: expected at most {LONGEST_SIDE} pixels a side, got 1000000000.*1 to 4 mega"),
        ("flux", {"height": LONGEST_SIDE + 4}, f"Height: expected at most {LONGEST_SIDE} pixels a side, got 2052"),
        ("flux", {"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_drawn(models: dict[str, Model], name: str, change: dict[str, Any], message: str) -> None:
    request = {"prompt": "1" if name == "digits" else "a cat", **SMALL, "width": 16, **change}
    with pytest.raises(ValueError, match=message):
        draw(models[name], "student", Request(**request))


@pytest.mark.parametrize(
    ("place", "repository", "subfolder"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name/sub", "owner/name", "sub"),
        ("owner/name/sub/folder", "owner/name", "sub/folder"),
        ("/some/where/else", "/some/where/else", None),
        ("./some/where/else", "./some/where/else", None),
    ],
)
def test_repositories_and_their_subfolders(place: str, repository: str, subfolder: str | None) -> None:
    assert split_repository(place) == (repository, subfolder)


def test_a_folder_with_slashes_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my" / "own" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_repository("my/own/adapter") == ("my/own/adapter", None)


def test_a_base_of_another_family(folders: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match=r"is a Flux2Pipeline, not a FluxPipeline as FLUX\.1 needs"):
        load_text_model("flux", *folders["flux2"], device="cpu", dtype=torch.float32)


def test_no_student(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No digits student in .* `make demo` trains students"):
        load_digits(tmp_path)
