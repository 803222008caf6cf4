import json
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from piflow.cli import app
from piflow.commands.demo import default_configs
from piflow.digits.demo import _make_room, load_student, student_sampler
from piflow.digits.teacher import load_teacher, teacher_velocity
from piflow.models.dit import GMDiTTransformer2DModelV2
from piflow.training.config import load_config
from tests.processes import no_shared_memory_left, time_limit

FAST = {"iterations": 2, "batch_size_per_rank": 4}


def write_config(folder, name, nfe, **changes):
    raw = yaml.safe_load(default_configs()[0].read_text())
    raw["distillation"] |= {"nfe": nfe, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw | FAST))
    return path


def finish(config, folder):
    """What a finished training leaves: config.yaml, checkpoints and a real student, fresh from the teacher."""
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2)
    student.save_pretrained(folder / "student")
    (folder / "config.yaml").write_text(load_config(config, [f"output_dir={folder}"]).to_yaml())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step_000002")


def everything_below(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def limited():
    with time_limit(240), no_shared_memory_left():
        yield


def words(text):
    return " ".join(text.split())


def demo(*arguments):
    """The exit code of `piflow demo ARGUMENTS`, in this process."""
    with pytest.raises(SystemExit) as end:
        app(["demo", *map(str, arguments)], prog_name="piflow")
    return end.value.code


def said(capsys):
    captured = capsys.readouterr()
    return words(captured.out + captured.err)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_student_fresh_from_the_teacher_starts_along_its_velocity(tmp_path, nfe):
    """Without spread all components are the teacher's unguided velocity at sigma = 1, and the policy stays near it."""
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=4, spread=0.0, logstd=-8.0)
    student.save_pretrained(tmp_path)
    distillation = load_config(write_config(tmp_path, "config", nfe)).distillation
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 5, 9, 1])
    x_0 = student_sampler(load_student(tmp_path), distillation)(noise, labels)
    assert x_0.shape == noise.shape
    if nfe == 1:
        expected = noise - teacher_velocity(load_teacher(), labels, 1.0)(noise, torch.ones(5))
        torch.testing.assert_close(x_0, expected, atol=2e-3, rtol=0)


def test_missing_student_says_where_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"No student in {tmp_path}: config\.json and .* make demo"):
        load_student(tmp_path)


def test_student_with_missing_or_unknown_tensors_is_refused(tmp_path):
    GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2).save_pretrained(tmp_path)
    load_student(str(tmp_path))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if "proj_out_means" not in key}, file)
    with pytest.raises(ValueError, match=rf"{file} lacks 2 tensors, proj_out_means\.bias .* make demo"):
        load_student(tmp_path)
    save_file(weights | {"surplus": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=rf"{file} has, unknown to its config.json, 1 tensors, surplus"):
        load_student(tmp_path)


def test_finished_student_with_the_same_configuration_is_kept(tmp_path, capsys):
    config, out = write_config(tmp_path, "tiny", 1), tmp_path / "out"
    finish(config, out / "tiny")
    before = everything_below(out / "tiny")
    assert demo("--out", out, "--config", config, "--num-samples", 40) == 1  # an untrained student
    assert everything_below(out / "tiny") == before
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "samples.png", "tiny"]
    assert "tiny/student is finished, with the same configuration: kept" in words(capsys.readouterr().out)
    assert "distil tiny (kept from before)" in (out / "report.md").read_text()


def test_fresh_moves_every_earlier_training_aside(tmp_path, capsys):
    path, folder = write_config(tmp_path, "tiny", 1), tmp_path / "out" / "tiny"
    config = load_config(path, [f"output_dir={folder}"])
    for number in (1, 2):
        finish(path, folder)
        before = everything_below(folder)
        _make_room(folder, config, fresh=False, console=Console())
        assert everything_below(folder) == before
        _make_room(folder, config, fresh=True, console=Console())
        assert everything_below(tmp_path / "out" / f"tiny.replaced.{number}") == before
        assert not folder.exists()
    assert f"{folder} is moved to {folder}.replaced.2" in words(capsys.readouterr().out)


def test_report_measures_the_teacher_of_the_configurations(tmp_path, capsys):
    teacher = load_teacher()
    torch.nn.init.zeros_(teacher.proj_out_2.weight)
    torch.nn.init.zeros_(teacher.proj_out_2.bias)
    teacher.save_pretrained(tmp_path / "teacher")  # its velocity is zero: its samples are the noise
    config, out = write_config(tmp_path, "tiny", 1), tmp_path / "out"
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(raw | {"teacher": {"kind": "digits", "path": str(tmp_path / "teacher")}}))
    finish(config, out / "tiny")
    assert demo("--out", out, "--config", config, "--num-samples", 40) == 1
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert rows[1]["name"] == "teacher, 1 Euler step"
    assert rows[1]["endpoint_mse"] == 0
    assert "load the teacher of" in (out / "report.md").read_text()

    other = write_config(tmp_path, "other", 2)
    assert demo("--out", out, "--config", config, "--config", other) == 2
    assert "one teacher" in said(capsys)


def test_default_output_of_a_training_is_not_the_demos():
    folders = [load_config(path).output_dir for path in default_configs()]
    assert len(set(folders)) == len(default_configs())
    assert not any(folder.is_relative_to("outputs/digits") for folder in folders)


def test_configurations_that_cannot_share_a_report_end_before_training(tmp_path, capsys):
    one = write_config(tmp_path, "one", 1)
    two = write_config(tmp_path, "two", 2, guidance_scale=3.0)
    assert demo("--out", tmp_path / "out", "--config", one, "--config", two) == 2
    assert "need one guidance_scale, one shift and one teacher" in said(capsys)
    assert demo("--out", tmp_path / "out", "--config", tmp_path / "none.yaml") == 2
    assert "none.yaml" in said(capsys)
    assert not (tmp_path / "out").exists()
    assert demo("--out", one, "--config", one) == 1
    assert "one.yaml cannot be a folder for the results" in said(capsys)


@pytest.mark.launcher
@pytest.mark.usefixtures("limited")
def test_whole_demo_in_small(tmp_path, capfd):
    """The real launcher, two iterations, forty samples: all files, and a non-zero exit because the bar is missed.

    A training with another configuration stands where this one goes: it is moved aside as it is.
    """
    config = write_config(tmp_path, "tiny", 1)
    finish(write_config(tmp_path, "mine", 1, guidance_scale=3.0), tmp_path / "out" / "tiny")
    mine = everything_below(tmp_path / "out" / "tiny")
    code = demo("--out", tmp_path / "out", "--config", config, "--num-samples", 40, "--processes", 1)
    assert everything_below(tmp_path / "out" / "tiny.replaced.1") == mine
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert code == 1
    assert (report["rows"][-1]["kind"], report["rows"][-1]["nfe"]) == ("student", 1)
    assert report["stage_seconds"]["distil tiny"] > 0
    assert (tmp_path / "out" / "samples.png").is_file()
    assert (tmp_path / "out" / "tiny" / "student" / "config.json").is_file()
    output = capfd.readouterr().out
    assert "tiny holds another training and is moved to" in words(output)
    assert "MISSED" in output
    assert "report.md" in output


@pytest.mark.launcher
@pytest.mark.usefixtures("limited")
def test_interrupted_demo_says_how_to_go_on_and_keeps_what_is_finished(tmp_path):
    done, long = write_config(tmp_path, "done", 1), write_config(tmp_path, "long", 2)
    long.write_text(long.read_text().replace("iterations: 2\n", "iterations: 100000\nlog_every: 1\n", 1))
    finish(done, tmp_path / "out" / "done")
    before = everything_below(tmp_path / "out" / "done")
    words_of_command = ["--out", tmp_path / "out", "--config", done, "--config", long, "--processes", 1]
    command = [sys.executable, "-m", "piflow.digits.demo", *map(str, words_of_command)]  # an alias
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "loss" in line:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stdout.readlines()
    output = words("".join(lines))
    assert process.returncode == 130, output
    assert output.endswith("piflow: stopped. To go on, run the same command again: finished students are kept.")
    assert "Traceback" not in output
    assert everything_below(tmp_path / "out" / "done") == before
    assert (tmp_path / "out" / "long" / "checkpoints" / "latest").is_file()
