import json

import pytest
import torch

from piflow.digits.data import load_digits_images
from piflow.digits.report import ReportSettings, Student, write_report

SETTINGS = ReportSettings(num_samples=40, reference_steps=6, batch_size=16)
ROW_KEYS = {
    "name", "kind", "nfe", "network_evaluations", "frechet_to_teacher", "frechet_to_data", "accuracy", "endpoint_mse",
    "samples_per_second",
}  # fmt: skip


def real_digits(noise, labels):
    """A sampler that answers every request with a scan of the class."""
    images, image_labels = load_digits_images()
    return torch.stack([images[image_labels == label][0] for label in labels.tolist()])


def blank(noise, labels):
    return torch.full_like(noise, -1.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "digits"
    students = [Student("student, 1 NFE", 1, real_digits), Student("student, 4 NFE", 4, blank)]
    return write_report(students, out, SETTINGS, stage_seconds={"training": 12.0}), out


def test_rows(written):
    report, _ = written
    assert [(row["kind"], row["nfe"]) for row in report["rows"]] == [
        *(("teacher", steps) for steps in (6, 1, 2, 4, 8)),
        ("student", 1),
        ("student", 4),
    ]
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    reference, student = report["rows"][0], report["rows"][5]
    assert reference["frechet_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert reference["endpoint_mse"] == 0
    assert (reference["network_evaluations"], student["network_evaluations"]) == (12, 1)
    assert student["accuracy"] == 1
    euler = {row["nfe"]: row["frechet_to_teacher"] for row in report["rows"] if row["kind"] == "teacher"}
    assert euler[1] > euler[2] > euler[4]


def test_bars_compare_with_the_teachers_euler_steps(written):
    report, _ = written
    rows = report["rows"]
    accuracy, one, four = report["bars"]
    assert (accuracy["value"], accuracy["bound"]) == (rows[0]["accuracy"], 0.95)
    assert (one["value"], one["bound"]) == (rows[5]["frechet_to_teacher"], rows[3]["frechet_to_teacher"])
    assert (four["value"], four["bound"]) == (rows[6]["frechet_to_teacher"], rows[4]["frechet_to_teacher"])
    assert all(bar["passed"] == (bar["value"] < bar["bound"]) for bar in (one, four))
    assert four["passed"] is False


def test_files(written):
    report, out = written
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["wall_seconds"] > 0
    assert report["stage_seconds"] == {"training": 12.0}
    assert report["seed"] == 0
    assert {"cpu", "cores", "torch_threads"} <= report["machine"].keys()
    assert "torch" in report["versions"]
    text = (out / "report.md").read_text()
    assert all(f"| {row['name']} | {row['nfe']} |" in text for row in report["rows"])
    assert "MISSED" in text
    assert "samples.png" in text
    picture = (out / "samples.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert width > 1000
    assert height > 500


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda noise, labels: noise[:, :, :4], r"broken returned samples of shape \(40, 1, 4, 8\)"),
        (lambda noise, labels: noise * float("nan"), r"broken returned NaN or infinity in 40 of 40 samples"),
    ],
)
def test_broken_students_are_named(tmp_path, sample, message):
    settings = ReportSettings(num_samples=40, reference_steps=1, teacher_steps=())
    with pytest.raises(ValueError, match=message):
        write_report([Student("broken", 1, sample)], tmp_path, settings)


def test_too_few_samples():
    with pytest.raises(ValueError, match="num_samples must be at least 20"):
        ReportSettings(num_samples=5)
