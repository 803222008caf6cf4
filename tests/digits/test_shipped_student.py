"""The four-step student that ships with the package: what its account says of it holds."""

import json

import pytest
import torch

from piflow.digits.demo import student_sampler
from piflow.digits.folders import load_network
from piflow.digits.teacher import SHIPPED_WEIGHTS, euler_sample, load_teacher, teacher_velocity
from piflow.models import GMDiTTransformer2DModelV2
from piflow.noise_schedule import NoiseSchedule
from piflow.training.sections import DistillationConfig

FOLDER = SHIPPED_WEIGHTS.with_name("student-nfe4")


@pytest.mark.slow
def test_shipped_student_ends_where_its_account_says():
    account = json.loads((FOLDER / "recipe.json").read_text())
    student = load_network(GMDiTTransformer2DModelV2, FOLDER, "student", "")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}  # kept in float16 on disk
    sample = student_sampler(student, DistillationConfig.model_validate(account["config"]["distillation"]))

    measured = account["measured"]
    generator = torch.Generator().manual_seed(measured["seed"])
    noise = torch.randn(measured["num_samples"], 1, 8, 8, generator=generator)[:400]
    labels = torch.arange(400) % 10
    with torch.no_grad():
        reference = euler_sample(teacher_velocity(load_teacher(), labels, 2.0), noise, 64, NoiseSchedule())
        error = (sample(noise, labels) - reference).square().mean().item()
    assert error == pytest.approx(measured["endpoint_mse_of_first_400"], rel=0.02)
