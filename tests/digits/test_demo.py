import json

import pytest
import torch
import yaml

from piflow.digits.demo import DEFAULT_CONFIGS, load_student, main, student_sampler
from piflow.digits.teacher import load_teacher, teacher_velocity
from piflow.models.dit import GMDiTTransformer2DModelV2
from piflow.training.config import load_config
from piflow.training.errors import TrainingError

FAST = {"iterations": 2, "batch_size_per_rank": 4}


def write_config(folder, name, nfe, **changes):
    raw = yaml.safe_load(DEFAULT_CONFIGS[0].read_text())
    raw["distillation"] |= {"nfe": nfe, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw | FAST))
    return path


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


def test_missing_student_says_where(tmp_path):
    with pytest.raises(TrainingError, match=f"left no student in {tmp_path}"):
        load_student(tmp_path)


def test_configurations_that_cannot_share_a_report_end_before_training(tmp_path, capsys):
    one = write_config(tmp_path, "one", 1)
    two = write_config(tmp_path, "two", 2, guidance_scale=3.0)
    assert main(["--out", str(tmp_path / "out"), "--configs", str(one), str(two)]) == 2
    assert "need one guidance_scale and one shift" in " ".join(capsys.readouterr().out.split())
    assert main(["--out", str(tmp_path / "out"), "--configs", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.launcher
def test_whole_demo_in_small(tmp_path, capfd):
    """The real launcher, two iterations, forty samples: all files, and a non-zero exit because the bar is missed."""
    config = write_config(tmp_path, "tiny", 1)
    code = main(
        ["--out", str(tmp_path / "out"), "--configs", str(config), "--num-samples", "40", "--num-processes", "1"]
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert code == 1
    assert (report["rows"][-1]["kind"], report["rows"][-1]["nfe"]) == ("student", 1)
    assert report["stage_seconds"]["distil tiny"] > 0
    assert (tmp_path / "out" / "samples.png").is_file()
    assert (tmp_path / "out" / "tiny" / "student" / "config.json").is_file()
    output = capfd.readouterr().out
    assert "MISSED" in output
    assert "report.md" in output
