"""`piflow evaluate` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from typer.testing import CliRunner

from piflow.cli import app
from piflow.digits.data import load_digits_images
from piflow.digits.teacher import load_teacher
from piflow.models import GMDiTTransformer2DModelV2, GMQwenImageTransformer2DModel
from piflow.models.export import export_adapter
from tests.data.bases import save_flux, save_qwen_image
from tests.evaluation.tiny import inception_weights, picture, save_clip
from tests.pipelines.tiny import qwen_base
from tests.processes import time_limit

DIGITS = ["--features", "digits"]
PIXELS = ["--features", "pixels"]


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def save_digits(path: Path, start: int = 0, count: int = 60) -> Path:
    images, labels = load_digits_images()
    save_file({"images": images[start : start + count], "labels": labels[start : start + count]}, path)
    return path


def test_a_student_beside_its_teacher(tmp_path: Path) -> None:
    """The worked example of the documentation, with a student that has only been initialised, and fewer samples."""
    GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2).save_pretrained(tmp_path / "student")
    words = [tmp_path / "student", "--teacher", "digits:teacher", "--reference", "digits:data", *DIGITS]
    words += ["--num-samples", 40, "--nfe", 1, "--teacher-nfe", 3, "--seeds", "0-1", "--out", tmp_path / "out"]
    code, said, errors = run(*words)
    assert (code, errors) == (0, "")
    assert "frechet_to_teacher" in said
    assert "95% t-interval over 2 runs" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"]["samples"] == [f"{tmp_path / 'student'}, seed {seed}" for seed in (0, 1)]
    assert found["metrics"].keys() >= {
        "endpoint_mse",
        "frechet",
        "precision",
        "class_accuracy",
        "coverage_of_teacher",
    } - {
        "coverage_of_teacher"  # four samples of a class have no fifth neighbour
    }
    assert found["left_out"]["coverage_of_teacher"] == "no class or prompt has more than 5 samples of the teacher."
    assert "# Evaluation" in (tmp_path / "out" / "results.md").read_text()

    code, said, errors = run(*words, "--json")  # from the cache
    assert (code, errors) == (0, "")
    assert said == (tmp_path / "out" / "results.json").read_text()
    assert json.loads(said) == found


def test_adm_files_with_inception(tmp_path: Path) -> None:
    images = torch.cat([picture(16, 16), picture(16, 16).flip(2), picture(16, 16).flip(3)])
    torch.save(inception_weights(), tmp_path / "inception.pth")
    np.savez(tmp_path / "samples.npz", images[:2].permute(0, 2, 3, 1).numpy())
    np.savez(
        tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images.permute(0, 2, 3, 1).numpy()
    )
    words = [tmp_path / "samples.npz", "--reference", tmp_path / "reference.npz", "--out", tmp_path / "out"]
    words += ["--inception", tmp_path / "inception.pth", "--metrics", "fid,kid,inception_score"]
    code, said, errors = run(*words, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(said)
    assert found["metrics"].keys() == {"fid", "kid", "inception_score"}
    assert found["settings"]["statistics"] == "mu and sigma of the reference, 2048 features"
    assert "fid: 2 samples are too few for 2048 features" in found["warnings"][0]


def test_statistics_are_of_inceptions_features(tmp_path: Path) -> None:
    """With other features, a reference batch is compared by its images."""
    images, _ = load_digits_images()
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048), "arr_0": images[100:200].permute(0, 2, 3, 1).numpy()}
    np.savez(tmp_path / "reference.npz", **arrays)
    words = [save_digits(tmp_path / "x.safetensors"), "--reference", tmp_path / "reference.npz", *PIXELS]
    code, said, errors = run(*words, "--out", tmp_path / "out", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(said)
    assert found["settings"]["statistics"] is None
    assert found["metrics"]["frechet"]["mean"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_beside_its_base(tmp_path: Path, dtype: str) -> None:
    """Both start from the same noise, and a student that was only initialised has the base's velocity there."""
    base = save_qwen_image(tmp_path / "base")
    student = GMQwenImageTransformer2DModel.from_teacher(qwen_base(), 3).eval()
    adapter = export_adapter(student, qwen_base(), tmp_path / "adapter", policy_config={"type": "GMFlow", "nfe": 1})
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    words = [adapter, "--base", base, "--teacher", base, "--prompts", tmp_path / "prompts.txt", *PIXELS, "--nfe", 1]
    words += ["--teacher-nfe", 1, "--num-samples", 4, "--dtype", dtype, "--teacher-call", json.dumps(call)]
    code, said, errors = run(
        *words, "--call", json.dumps(call | {"total_substeps": 1}), "--out", tmp_path / "out", "--json"
    )
    assert (code, errors) == (0, "")
    found = json.loads(said)["metrics"]
    assert found["endpoint_mse"]["mean"] < 1e-3 < found["diversity"]["mean"]


def test_a_student_in_latents(tmp_path: Path) -> None:
    """Errors are of latents, features of decoded images."""
    GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2).save_pretrained(tmp_path / "student")
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    words = [tmp_path / "student", "--teacher", "digits:teacher", "--nfe", 1, "--teacher-nfe", 2, "--num-samples", 20]
    found = []
    for extra in ([], ["--vae", tmp_path / "vae"]):
        code, said, errors = run(*words, *PIXELS, *extra, "--out", tmp_path / "out", "--json")
        assert (code, errors) == (0, "")
        found.append(json.loads(said)["metrics"])
    assert found[0]["endpoint_mse"] == found[1]["endpoint_mse"]
    assert found[0]["diversity"] != found[1]["diversity"]


def test_prompts_of_a_pipeline(tmp_path: Path) -> None:
    """A text-to-image pipeline from its folder beside itself, with a CLIP score; the teacher starts from its noise."""
    base, clip = save_flux(tmp_path / "base"), save_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    call = json.dumps({"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 8})
    words = [base, "--teacher", base, "--prompts", tmp_path / "prompts.txt", "--clip", clip, *PIXELS]
    words += ["--num-samples", 4, "--batch-size", 2, "--call", call, "--teacher-call", call, "--out", tmp_path / "out"]
    code, said, errors = run(*words, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(said)
    assert found["metrics"]["endpoint_mse"]["mean"] == 0
    assert found["metrics"]["diversity_ratio"]["mean"] == 1
    assert found["by_group"]["diversity"].keys() == {"0", "1"}  # the prompts
    assert 0 <= found["metrics"]["clip_score"]["mean"] <= 100


def test_documented_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    block = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "evaluation.md", "exec"), {})
    assert "| endpoint_mse | 0.04" in capsys.readouterr().out
    assert (tmp_path / "outputs" / "features").is_dir()


def test_several_files_are_several_runs(tmp_path: Path) -> None:
    files = [save_digits(tmp_path / f"{n}.safetensors", 60 * n) for n in range(2)]
    teachers = [word for n in range(2) for word in ("--teacher", save_digits(tmp_path / f"t{n}.safetensors", 60 * n))]
    code, said, _ = run(*files, *teachers, *PIXELS, "--out", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(said)
    assert found["metrics"]["endpoint_mse"]["runs"] == [0, 0]
    assert len(found["metrics"]["diversity"]["runs"]) == 2


@pytest.mark.slow
def test_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    images, _ = load_digits_images()
    np.save(tmp_path / "images.npy", images.repeat(2, 1, 1, 1).numpy())
    words = [tmp_path / "images.npy", *DIGITS, "--metrics", "classifier_score", "--shard-size", 20]

    def arguments(out: str) -> list[str]:
        return [*map(str, words), "--out", str(tmp_path / out), "--json"]

    def shards() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("features/*/shard-*.safetensors")}

    with (
        time_limit(240),
        subprocess.Popen(
            [sys.executable, "-m", "piflow.cli", "evaluate", *arguments("out")], stdout=subprocess.DEVNULL
        ) as process,
    ):
        while len(shards()) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    before = shards()
    assert process.returncode == -9
    assert 5 <= len(before) < 3594 // 20
    code, said, errors = run(*arguments("out"))
    assert (code, errors) == (0, "")
    after = shards()
    assert len(after) == -(-3594 // 20)
    assert {path: after[path] for path in before} == before  # kept
    assert run(*arguments("again")) == (0, said, "")


def test_quiet_where_it_is_piped(tmp_path: Path) -> None:
    words = [str(save_digits(tmp_path / "x.safetensors")), *PIXELS, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "piflow.cli", "evaluate", *words, "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["metrics"]
    assert "%" not in done.stderr
    assert "x.safetensors" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{x}"], "--features: say what images are compared by"),
        (["{x}", "--features", "inception"], "--inception weights-inception-2015-12-05-6726825d.pth, a release file"),
        (["{x}", "--inception", "none.pth"], "There is no file none.pth with the weights of Inception. Wanted is"),
        (["{x}", "--features", "clip"], "--features clip needs the folder of the CLIP model"),
        (["{x}", *PIXELS, "--clip", "none"], "No CLIP model in none: config.json and"),
        (["none.npz", *PIXELS], "There is no file or folder none.npz"),
        (["{x}", *PIXELS, "--reference", "none.npz"], "There is no file or folder none.npz"),
        (["{x}", *PIXELS, "--metrics", "speed"], "There is no metric 'speed'"),
        (["{x}", *PIXELS, "--metrics", "frechet"], "frechet cannot be measured: there is no reference."),
        (["{x}", *PIXELS, "--seeds", "a"], "--seeds: expected whole numbers"),
        (["digits:teacher", *DIGITS, "--classes", "3-10"], "--classes: digits:teacher has classes 0 to 9, got 10."),
        (["digits:teacher", *DIGITS, "--call", "[]"], "--call: expected a JSON object, got []"),
        (["digits:teacher", *DIGITS, "--call", '{"speed": 1}'], "takes the arguments"),
        (["{x}", "{x}", "{x}", *PIXELS, "--teacher", "{x}", "--teacher", "{x}"], "one for each of 3 runs, got 2."),
        (["{nan}", *PIXELS], "has NaN or infinity in 60 of 60 images, first in image 0."),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    places = {"x": save_digits(tmp_path / "x.safetensors"), "nan": tmp_path / "nan.pt"}
    torch.save(torch.full((60, 1, 8, 8), torch.nan), places["nan"])
    code, said, errors = run(
        *(word.format(**places) if word in ("{x}", "{nan}") else word for word in words), "--out", tmp_path / "o"
    )
    unusable = message.startswith(("--seeds: expected", "--call: expected"))  # an option that cannot be read at all
    assert (code, said) == (2 if unusable else 1, "")
    assert message in errors
    assert errors.startswith("piflow: ")
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "o" / "results.json").exists()
