"""`piflow inspect`: facts of real files, and what it says of damaged, pickled and foreign ones."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from piflow.apps.png import save_png
from piflow.cli import app
from piflow.digits.teacher import SHIPPED_WEIGHTS
from piflow.models.adapter_files import CONFIG, WEIGHTS
from tests.commands.runs import finished_run
from tests.data.bases import save_qwen_image
from tests.golden_vectors import GOLDEN

ADAPTER = GOLDEN / "g08_export_gmqwen"


def inspect(path: Path, *words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", str(path), *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def facts(path: Path, *words: str) -> dict[str, Any]:
    code, said, noted = inspect(path, "--json", *words)
    assert (code, noted) == (0, "")
    return json.loads(said)


@pytest.mark.parametrize("path", [ADAPTER, ADAPTER / WEIGHTS, ADAPTER / CONFIG])
def test_adapter(path: Path) -> None:
    """By its folder, or any file of it; counted against the tensors themselves."""
    found, tensors = facts(path), load_file(ADAPTER / WEIGHTS)
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    assert (found["kind"], found["policy"], found["components"], found["channels"]) == ("adapter", "GMFlow", 3, 4)
    assert (found["class"], found["base_model"]) == ("GMQwenImageTransformer2DModel", "QwenImageTransformer2DModel")
    assert found["trained_nfe"] is None
    assert found["policy_config"] == {"type": "GMFlow"}
    assert (found["lora"]["rank"], found["lora"]["alpha"], found["lora"]["layers"]) == ([4], "rank", len(lora) // 2)
    assert found["lora"]["targets"]["transformer_blocks.*.img_mlp.net.2"] == 2
    assert found["parameters"]["total"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["parameters"]["lora"] == sum(tensor.numel() for tensor in lora.values())
    assert found["parameters"]["output_layers"] == found["parameters"]["total"] - found["parameters"]["lora"]
    assert found["dtypes"] == {"F32": found["parameters"]["total"]}
    assert found["bytes"] == (ADAPTER / WEIGHTS).stat().st_size


def test_weights_alone_say_what_they_can(tmp_path: Path) -> None:
    """Without config.json K is known only together with the sub-pixels of a token."""
    shutil.copy(ADAPTER / WEIGHTS, tmp_path / "renamed.safetensors")
    found = facts(tmp_path / "renamed.safetensors")
    assert (found["kind"], found["policy"], found["class"], found["channels"]) == ("adapter", "GMFlow", None, 4)
    assert (found["components"], found["components_times_subpixels"]) == (None, 3 * 4)
    assert "components" in inspect(tmp_path)[1]
    assert facts(tmp_path)["lora"] == found["lora"]


def test_dx_student_and_what_its_metadata_says(tmp_path: Path) -> None:
    found = facts(GOLDEN / "g08_dxqwen_grid")
    assert (found["kind"], found["policy"], found["mode"], found["grid_points"]) == ("student", "DX", "grid", 4)
    shutil.copytree(GOLDEN / "g08_dxqwen_grid", tmp_path / "x")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "x" / WEIGHTS).items()}
    policy = {"type": "DX", "mode": "polynomial", "segment_size": 0.25, "shift": 3.2, "nfe": 4}
    save_file(tensors, tmp_path / "x" / WEIGHTS, metadata={"policy_config": json.dumps(policy)})
    found = facts(tmp_path / "x")
    assert (found["mode"], found["segment_size"], found["shift"], found["trained_nfe"]) == ("polynomial", 0.25, 3.2, 4)
    assert list(found["dtypes"]) == ["BF16"]


def test_trained_nfe_of_a_shipped_student_is_in_its_recipe(tmp_path: Path) -> None:
    shipped = SHIPPED_WEIGHTS.with_name("student-nfe4")
    assert facts(shipped)["trained_nfe"] == facts(shipped / WEIGHTS)["trained_nfe"] == 4
    for name in (CONFIG, WEIGHTS):
        shutil.copy(shipped / name, tmp_path)
    assert re.search(r"^trained nfe +not stated$", inspect(tmp_path)[1], re.MULTILINE)
    (tmp_path / "recipe.json").write_text('["somebody else\'s"]')
    assert facts(tmp_path)["trained_nfe"] is None


@pytest.mark.parametrize(("segment_size", "nfe"), [(1 / 3.5, 4), (0.25, 4), (1 / 7.5, 8), (0.1333, 8), (1.0, 1)])
def test_trained_nfe_of_a_dx_policy_is_in_its_segments(tmp_path: Path, segment_size: float, nfe: int) -> None:
    """One segment for each evaluation, the last one perhaps shorter, as in the published adapters."""
    shutil.copy(GOLDEN / "g08_dxqwen_grid" / CONFIG, tmp_path)
    policy = {"type": "DX", "segment_size": segment_size, "shift": 3.2}
    tensors = load_file(GOLDEN / "g08_dxqwen_grid" / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"policy_config": json.dumps(policy)})
    assert facts(tmp_path)["trained_nfe"] == nfe


def test_a_loss_that_is_not_finite_is_no_number(tmp_path: Path) -> None:
    """JSON has none for it."""
    step = finished_run(tmp_path) / "checkpoints" / "step_000002"
    manifest = step / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"loss": "nan"}))
    assert facts(step)["loss"] is None


def test_sharded_weights_count_as_one(tmp_path: Path) -> None:
    tensors = load_file(ADAPTER / WEIGHTS)
    shutil.copy(ADAPTER / CONFIG, tmp_path)
    metadata = {"policy_config": '{"type": "GMFlow"}'}
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file, metadata=metadata)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    whole = facts(ADAPTER)
    assert facts(tmp_path)["parameters"] == whole["parameters"]
    assert facts(tmp_path / f"{WEIGHTS}.index.json")["lora"] == whole["lora"]
    (tmp_path / "b.safetensors").unlink()
    assert (
        inspect(tmp_path)[2] == f"piflow: {tmp_path} is incomplete: b.safetensors is missing, which its index lists.\n"
    )


def test_training_its_checkpoint_and_its_student(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    found = facts(run)
    assert (found["kind"], found["policy"], found["components"], found["trained_nfe"]) == ("training", "GMFlow", 2, 2)
    assert found["checkpoints"] == ["step_000002"]
    assert found["student"]["parameters"]["total"] > 100_000
    assert found["student"]["trained_nfe"] == 2
    step = facts(run / "checkpoints" / "step_000002")
    assert step == found["newest_checkpoint"]
    assert (step["iteration"], step["samples_seen"], step["loss"], step["processes"]) == (2, 128, 0.25, 2)
    assert (step["whole"], step["checked"]) == (True, "sizes")
    said = inspect(run)[1]
    assert "newest checkpoint\n    kind " in said
    assert "teacher" in said


def test_damaged_checkpoint(tmp_path: Path) -> None:
    """A size tells without --verify, another content of the same size only with it."""
    step = finished_run(tmp_path) / "checkpoints" / "step_000002"
    states = step / "engine" / "states.pt"
    states.write_bytes(states.read_bytes()[::-1])
    assert facts(step)["whole"]
    code, said, _ = inspect(step, "--verify")
    assert code == 1
    assert "states.pt has another content than was written" in said
    states.write_bytes(b"short")
    code, said, _ = inspect(step, "--json")
    assert code == 1
    assert json.loads(said)["problems"] == ["states.pt has 5 bytes, not 15"]
    (step / "manifest.json").write_text("{}")
    assert "no manifest of a checkpoint" in inspect(step)[2]


def test_training_is_as_damaged_as_its_newest_checkpoint(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert inspect(run)[0] == 0
    manifest = run / "checkpoints" / "step_000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in content.items() if key != "config"}))
    code, said, _ = inspect(run)
    assert code == 1
    assert "manifest.json lacks the configuration: an earlier version of piflow wrote it" in said


def test_a_folder_of_trainings_names_them(tmp_path: Path) -> None:
    finished_run(tmp_path / "nfe2")
    code, _, noted = inspect(tmp_path)
    assert code == 1
    assert noted.endswith("Look into its folders: nfe2.\n")


def test_pipeline(tmp_path: Path) -> None:
    found = facts(save_qwen_image(tmp_path / "base"))
    assert (found["kind"], found["class"]) == ("pipeline", "QwenImagePipeline")
    assert found["parts"]["transformer"] == "QwenImageTransformer2DModel"
    assert (found["transformer"]["kind"], found["transformer"]["pi_flow"]) == ("network without a policy", False)


def test_picture(tmp_path: Path) -> None:
    save_png(Image.new("L", (8, 8)), tmp_path / "a.png", {"seed": 7})
    assert facts(tmp_path / "a.png")["settings"] == {"seed": 7}
    assert inspect(tmp_path / "a.png")[1].endswith("settings\n    seed  7\n")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    assert inspect(tmp_path / "b.png")[0] == 1


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A file that writes another one when it is read, under every name that pickles go by, in files and folders."""

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    shutil.copy(ADAPTER / CONFIG, tmp_path)
    for name in ("x.pt", "x.bin", "x.ckpt", "x.pth", "x.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        code, _, noted = inspect(tmp_path / name)
        assert code == 1
        assert "a pickled file, which can run code when it is read: this command never does" in noted
    assert "has its weights in x.bin, a pickled file" in inspect(tmp_path)[2]
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert inspect(tmp_path / "x.safetensors")[0] == 1
    torch.save({"a": torch.zeros(1)}, tmp_path / "nameless")
    assert inspect(tmp_path / "nameless")[0] == 1
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("length", [0, 4, 100, 20_000, -1])
def test_damaged_weights_are_one_line(tmp_path: Path, length: int) -> None:
    shutil.copy(ADAPTER / CONFIG, tmp_path)
    (tmp_path / WEIGHTS).write_bytes((ADAPTER / WEIGHTS).read_bytes()[:length])
    code, said, noted = inspect(tmp_path)
    assert (code, said) == (1, "")
    assert noted.startswith(f"piflow: {tmp_path / WEIGHTS} is no safetensors file, or damaged or cut short")
    assert len(noted.splitlines()) == 1


def test_foreign_things_are_answered(tmp_path: Path) -> None:
    assert inspect(tmp_path / "no")[2].startswith(f"piflow: There is no file or folder {tmp_path / 'no'} here")
    assert "holds nothing that this command knows" in inspect(tmp_path)[2]
    (tmp_path / "notes.txt").write_text("a list of things to buy")
    assert "notes.txt is nothing that this command knows" in inspect(tmp_path / "notes.txt")[2]
    (tmp_path / CONFIG).write_text("[1]")
    assert "expected a JSON object, got a list" in inspect(tmp_path)[2]
    (tmp_path / CONFIG).write_text("{}")
    assert "is incomplete: beside config.json there are no weights" in inspect(tmp_path)[2]
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "style.safetensors")
    (tmp_path / CONFIG).unlink()
    found = facts(tmp_path / "style.safetensors")
    assert (found["kind"], found["pi_flow"]) == ("LoRA without a policy's output layers", False)
    metadata = {"policy_config": "[1]"}
    save_file({"proj_out.weight": torch.zeros(2, 3)}, tmp_path / "style.safetensors", metadata=metadata)
    assert "policy_config in the weights' metadata is no JSON object" in inspect(tmp_path)[2]
