"""`piflow sample`: real pipelines at tiny size, from what people name as a model to the PNG files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from piflow.apps.png import read_settings
from piflow.cli import app
from piflow.digits.teacher import load_teacher
from piflow.models import GMDiTTransformer2DModelV2, GMQwenImageTransformer2DModel
from piflow.models.export import export_adapter
from piflow.pipelines import PiDiTPipeline, PiQwenImagePipeline
from piflow.schedulers import FlowMapSDEScheduler
from piflow.training.config import TrainConfig
from tests.commands.runs import SETTINGS, finished_run
from tests.data.bases import save_qwen_image
from tests.golden_vectors import GOLDEN
from tests.pipelines.tiny import FAMILIES, qwen_base, student_of


@pytest.fixture(scope="module")
def student() -> GMDiTTransformer2DModelV2:
    generator = torch.Generator().manual_seed(0)
    return GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2, generator=generator)


@pytest.fixture
def distilled(student: GMDiTTransformer2DModelV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what `piflow demo` leaves of a training, in which the command then runs."""
    run = tmp_path / "outputs" / "digits" / "nfe4"
    student.save_pretrained(run / "student")
    settings = {"nfe": 3, "final_step_size_scale": 0.5, "shift": 2.0, "total_substeps": 32}
    config = TrainConfig.model_validate({"output_dir": str(run), "iterations": 1, "distillation": settings})
    (run / "config.yaml").write_text(config.to_yaml())
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a text encoder, and an adapter of it."""
    folder = tmp_path_factory.mktemp("qwen")
    base = save_qwen_image(folder / "base")
    student = student_of(qwen_base(), "GM")
    assert isinstance(student, GMQwenImageTransformer2DModel)
    policy = {"type": "GMFlow", "nfe": 2}
    return {"base": base, "adapter": export_adapter(student, qwen_base(), folder / "adapter", policy_config=policy)}


def sample(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["sample", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def test_digits_are_the_pipelines_own_pictures(
    distilled: Path, student: GMDiTTransformer2DModelV2, tmp_path: Path
) -> None:
    """The training's steps, one picture for each class and seed, each as it is alone, enlarged to be seen."""
    code, said, _ = sample(distilled, "--class", "3,5", "--seed", "0-1", "--json")
    found = json.loads(said)
    assert code == 0
    assert [(made["class"], made["seed"]) for made in found["images"]] == [(3, 0), (5, 0), (3, 1), (5, 1)]
    schedule = {"shift": 2.0, "final_step_size_scale": 0.5}
    assert found["images"][0]["schedule"] == schedule
    pipe = PiDiTPipeline(student, vae=None, scheduler=FlowMapSDEScheduler(**schedule))
    pipe.set_progress_bar_config(disable=True)
    for made in found["images"]:
        generator = torch.Generator().manual_seed(made["seed"])
        alone = pipe(made["class"], num_inference_steps=3, total_substeps=32, generator=generator).images[0]
        assert np.array_equal(pixels(made["file"])[::8, ::8], np.asarray(alone))
        assert pixels(made["file"]).shape == (64, 64)
    grid = pixels(found["grid"])
    assert grid.shape == (2 * 64 + 2, 2 * 64 + 2)
    assert np.array_equal(grid[66:, :64], pixels(found["images"][2]["file"]))


def test_settings_are_in_the_pictures_and_none_is_replaced(distilled: Path) -> None:
    words = (distilled, "--class", 7, "--nfe", 4, "--temperature", 0.5, "--h", 0.5, "--substeps", 16)
    assert sample(*words)[:2] == (0, "samples/00001.png\n")
    settings = read_settings("samples/00001.png")
    assert settings["class"] == 7
    assert (settings["nfe"], settings["temperature"], settings["total_substeps"]) == (4, 0.5, 16)
    assert settings["schedule"]["h"] == 0.5
    first = Path("samples/00001.png").read_bytes()
    assert sample(*words, "--seed", "3-4")[:2] == (0, "samples/grid_00002-00003.png\n")
    assert Path("samples/00001.png").read_bytes() == first
    common = read_settings("samples/grid_00002-00003.png")
    assert (common["class"], common["seed"], common["nfe"]) == (7, [3, 4], 4)
    assert "file" not in common


def test_every_setting_changes_the_picture(distilled: Path) -> None:
    usual = (distilled, "--class", 7, "--nfe", 4, "--out")
    sample(*usual, "usual")
    again = sample(*usual, "again")
    assert again[0] == 0
    assert np.array_equal(pixels("usual/00001.png"), pixels("again/00001.png"))
    changes = (("--seed", 1), ("--temperature", 0.1), ("--h", 1), ("--shift", 4), ("--nfe", 3), ("--guidance", 3))
    for option, value in changes:
        folder = option.strip("-")
        assert sample(*usual, folder, option, value)[0] == 0
        assert not np.array_equal(pixels("usual/00001.png"), pixels(f"{folder}/00001.png")), option


def test_digits_work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped student and its teacher, whose pictures of a class and seed are alike."""
    monkeypatch.chdir(tmp_path)
    assert sample("--class", "0,1,4", "--out", "student")[:2] == (0, "student/grid_00001-00003.png\n")
    assert sample("digits-teacher", "--class", "0,1,4", "--nfe", 8, "--out", "teacher")[0] == 0
    student, teacher = (
        np.stack([pixels(f"{model}/{number:05d}.png").flatten() for number in (1, 2, 3)]).astype(float)
        for model in ("student", "teacher")
    )
    distance = np.abs(student[:, None] - teacher[None]).mean(-1)
    assert (distance.argmin(1) == np.arange(3)).all()


def test_fewer_steps_than_trained_are_warned_of_in_one_line(distilled: Path) -> None:
    code, _, noted = sample(distilled, "--class", 1, "--nfe", 2)
    assert code == 0
    assert noted.startswith("piflow: num_inference_steps: 2 is below the 3 network evaluations")
    assert len(noted.splitlines()) == 1


def test_prompts_with_an_adapter_and_without(qwen: dict[str, Path], tmp_path: Path) -> None:
    """The same as the pipeline's own call; NFE and schedule are those of the adapter."""
    words = (qwen["base"], "--prompt", "a cat", "--size", "16x12", "--json", "--out", tmp_path / "out")
    code, said, _ = sample(*words, "--adapter", qwen["adapter"], "--prompt", "a dog")
    assert code == 0
    found = json.loads(said)
    assert [(made["prompt"], made["seed"], made["nfe"]) for made in found["images"]] == [
        ("a cat", 0, 2),
        ("a dog", 0, 2),
    ]
    pipe = PiQwenImagePipeline.from_pretrained(qwen["base"])
    pipe.load_piflow_adapter(qwen["adapter"])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    alone = pipe("a dog", width=16, height=12, num_inference_steps=2, generator=generator).images[0]
    assert np.array_equal(pixels(found["images"][1]["file"])[::5, ::5], np.asarray(alone))

    base = json.loads(sample(*words, "--nfe", 3)[1])["images"][0]
    assert (base["adapter"], base["nfe"]) == (None, 3)
    assert "temperature" not in base
    code, _, noted = sample(*words, "--size", "17x12")
    assert (code, noted) == (2, "piflow: --size: expected multiples of 4, got 17; next to it are 16 and 20\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--prompt", "x"], "--prompt: digits takes a --class, a number."),
        (["digits", "--class", "10"], "--class: digits knows 0 to 9, got 10."),
        (["digits", "--class", "1", "--prompt", "x"], "give --prompt or --class"),
        (["digits", "--size", "64"], "--size: digits makes pictures of one size."),
        (["digits", "--seed", "5-2"], "--seed: expected whole numbers such as 3, 1,4 or 0-9, got '5-2'"),
        (["digits", "--seed", 2**64], "--seed: expected numbers below 2^64, got 18446744073709551616"),
        (["digits", "--vae", "x"], "--vae is for a student that makes latents; digits makes pictures."),
        (["digits", "--subfolder", "x"], "--subfolder is one of the adapter's: give --adapter too."),
        (["digits", "--temperature", "warm"], "--temperature: expected a number from 0 on, auto or none, got warm"),
        (["digits", "--h", "-1"], "--h: expected a number from 0 on, or inf, got -1"),
        (["digits", "--size", "wide"], "--size: expected width x height"),
        (["no such model", "--size", "1024x2049"], "--size: expected at most 2048 pixels a side, got 2049. The models"),
        (["no such model", "--size", "99999999"], "1 to 4 megapixels: larger ones repeat what they show"),
        (["digits", "--device", "moon"], "--device moon cannot be used"),
        (["digits", "--adapter", "x"], "--adapter goes on the pipeline of a base model, not on digits."),
        (["digits-teacher", "--h", "1"], "--substeps, --temperature and --h are a student's"),
        ([GOLDEN / "g08_gmdit", "--class", "1"], "makes latents of 4 channels: give the VAE"),
        ([GOLDEN / "g08_gmqwen", "--prompt", "x"], "piflow sample BASE --adapter"),
        ([GOLDEN / "README.md", "--prompt", "x"], "is a file: give the folder that holds it"),
    ],
)
def test_wrong_usage_ends_in_one_line(
    words: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, noted = sample(*words)
    assert (code, said) == (2, "")
    assert noted.startswith("piflow: ")
    assert message in noted
    assert len(noted.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no such model", "--prompt", "x"], "There is no folder no such model, and that is no name of a Hugging"),
        ([".", "--class", "1"], "holds no pipeline (model_index.json), student (config.json) or training."),
        ([GOLDEN / "g08_gmdit", "--class", "1", "--vae", "."], "cannot be loaded as AutoencoderKL (OSError: "),
    ],
)
def test_a_model_that_is_not_there_is_one_line(
    words: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, noted = sample(*words)
    assert (code, said) == (1, "")
    assert message in noted
    assert len(noted.splitlines()) == 1


def test_negative_prompt_does_what_it_says_or_is_refused(qwen: dict[str, Path], tmp_path: Path) -> None:
    """A student runs without guidance, so that a negative prompt alone would change nothing."""
    words = (qwen["base"], "--adapter", qwen["adapter"], "--prompt", "a", "--size", "16x12", "--out", tmp_path)
    code, _, noted = sample(*words, "--negative-prompt", "b")
    assert (code, noted) == (
        2, "piflow: --negative-prompt does nothing without guidance: give --guidance, above 1, too.\n"
    )  # fmt: skip
    assert sample(*words, "--negative-prompt", "b", "--guidance", 0)[0] == 2
    made = [
        json.loads(sample(*words, "--guidance", 4, "--negative-prompt", text, "--json")[1])["images"][0]["file"]
        for text in ("b", "c")
    ]
    assert not np.array_equal(pixels(made[0]), pixels(made[1]))


def test_vae_of_a_pipelines_folder(tmp_path: Path) -> None:
    dit = FAMILIES["dit"]
    dit.pipe("base").save_pretrained(tmp_path / "pipe")
    student_of(dit.base(), "GM").save_pretrained(tmp_path / "student")
    words = (tmp_path / "student", "--class", 3, "--json", "--out", tmp_path / "out", "--vae")
    made = [json.loads(sample(*words, tmp_path / vae)[1])["images"][0]["file"] for vae in ("pipe", "pipe/vae")]
    assert np.array_equal(pixels(made[0]), pixels(made[1]))


def test_damaged_pipeline_is_one_line(qwen: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    code, _, noted = sample(tmp_path, "--prompt", "x")
    assert code == 1
    assert "is a StableDiffusionPipeline: expected one of QwenImagePipeline, FluxPipeline" in noted
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json is not valid JSON" in sample(tmp_path, "--prompt", "x")[2]


def test_checkpoint_of_a_training_is_sampled(tmp_path: Path) -> None:
    """Of a folder without an exported student, the averaged one of the newest checkpoint is taken."""
    run = finished_run(tmp_path / "run")
    whole = json.loads(sample(run, "--class", 4, "--json", "--out", tmp_path / "a")[1])["images"][0]
    (run / "student").rename(tmp_path / "student")
    for name, model in (("b", run), ("c", run / "checkpoints" / "step_000002")):
        made = json.loads(sample(model, "--class", 4, "--json", "--out", tmp_path / name)[1])["images"][0]
        assert made["nfe"] == SETTINGS["nfe"]
        assert (made["nfe"], made["schedule"]) == (whole["nfe"], whole["schedule"])
        assert np.array_equal(pixels(made["file"]), pixels(whole["file"]))
