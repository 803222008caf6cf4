"""Whole evaluations of sources in memory: what is measured, repeated, kept, and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student_t

from piflow.digits.data import load_digits_images
from piflow.evaluation import frechet_distance, precision_recall
from piflow.evaluation.cache import FeatureCache
from piflow.evaluation.extractors import Clip, as_bytes, digits_extractor, pixel_extractor
from piflow.evaluation.measure import METRICS
from piflow.evaluation.models import ModelSource, open_model
from piflow.evaluation.report import Report, over_runs
from piflow.evaluation.run import Options, Run, evaluate
from piflow.evaluation.sources import ArraySource, Batch, Statistics, TensorSource
from tests.evaluation.tiny import save_clip

IMAGES, LABELS = load_digits_images()
OPTIONS = Options(batch_size=32, shard_size=50)


def digits(start: int, count: int = 120, name: str = "digits", noise: float = 0.0) -> TensorSource:
    images = IMAGES[start : start + count]
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(start))
    return TensorSource(name, images, LABELS[start : start + count])


class Counted(TensorSource):
    """Counts the images that are asked for."""

    asked = 0

    def batch(self, start: int, stop: int) -> Batch:
        self.asked += stop - start
        return super().batch(start, stop)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    runs = [Run(digits(n, name=f"run {n}", noise=0.2), digits(n, name=f"teacher {n}")) for n in (0, 100, 200)]
    cache = tmp_path_factory.mktemp("cache")
    return evaluate(runs, digits_extractor(), cache, reference=digits(500, 300, "data"), options=OPTIONS)


def test_everything_that_is_possible_is_measured(report: Report) -> None:
    assert set(report.content["metrics"]) == set(METRICS) - {"clip_score"}
    assert report.content["left_out"].keys() == {"clip_score"}
    assert report.value("endpoint_mse") == pytest.approx(0.04, rel=0.05)
    assert 0.9 < report.value("class_accuracy") <= 1
    assert report.content["by_group"]["coverage_of_teacher"].keys() == {str(n) for n in range(10)}
    assert report.content["confidence"] == "95% t-interval over 3 runs"


def test_values_are_those_of_the_functions(report: Report) -> None:
    extractor = digits_extractor()
    samples, data = (
        extractor(s.batch(0, s.count).images)["features"] for s in (digits(100, noise=0.2), digits(500, 300))
    )
    metrics = report.content["metrics"]
    assert metrics["frechet"]["runs"][1] == pytest.approx(frechet_distance(samples, data), rel=1e-5)
    found = [metrics[name]["runs"][1] for name in ("precision", "recall")]
    assert found == pytest.approx(precision_recall(samples, data), abs=0.01)


def test_interval_is_scipys() -> None:
    values = [1.0, 2.0, 4.0]
    found = over_runs(values)
    low, high = student_t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / 3**0.5)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-12)
    assert over_runs([3.0]) == {"mean": 3.0, "std": None, "low": None, "high": None, "runs": [3.0]}


def test_json_and_markdown(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == report.content
    text = (tmp_path / "results.md").read_text()
    assert all(f"\n| {name} | " in text for name in report.content["metrics"])
    assert "- clip_score: there is no CLIP model, or there are no prompts." in text
    assert "- frechet: 120 samples" not in text
    assert "coverage_of_teacher by class or prompt: 0 " in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {6}


def test_a_repeated_evaluation_is_the_same_to_the_bit(tmp_path: Path) -> None:
    def once(cache: str, **options: int) -> str:
        runs = [Run(digits(0, 60, noise=0.1), digits(0, 60))]
        chosen = Options(**{"batch_size": 32, "shard_size": 50, **options})
        content = evaluate(runs, pixel_extractor(), tmp_path / cache, reference=digits(60, 70), options=chosen).content
        return json.dumps(content["metrics"])

    first = once("a")
    assert once("a") == first  # from the cache
    assert once("b") == first
    assert once("c", batch_size=7, shard_size=11) == first  # pixels go through no network


def test_features_are_computed_once(tmp_path: Path) -> None:
    samples, teacher = (Counted(name, IMAGES[:60], LABELS[:60]) for name in ("samples", "teacher"))
    progress: list[tuple[str, int, int]] = []

    def run(**options: int) -> None:
        chosen = Options(**{"batch_size": 32, "shard_size": 25, **options})
        note = lambda *step: progress.append(step)  # noqa: E731
        evaluate([Run(samples, teacher)], pixel_extractor(), tmp_path, options=chosen, progress=note)

    run()
    assert (samples.asked, teacher.asked) == (60, 60)
    assert progress[-1] == ("samples", 60, 60)
    run()
    assert (samples.asked, teacher.asked) == (60, 60)
    damaged = next(path for path in tmp_path.glob("*/shard-00001.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run()
    assert samples.asked + teacher.asked in (120 + 25, 120 + 50)  # one side, or both for their pairs
    before = samples.asked
    run(batch_size=31)  # another setting
    assert samples.asked == before + 60


def test_a_shard_of_other_settings_is_not_read(tmp_path: Path) -> None:
    """Not even one that was copied to where it is looked for."""
    one, other = (Counted("x", IMAGES[n : n + 30], LABELS[n : n + 30]) for n in (0, 30))
    for source in (one, other):
        evaluate([Run(source)], pixel_extractor(), tmp_path, options=OPTIONS)
    a, b = tmp_path.glob("*/shard-00000.safetensors")
    b.write_bytes(a.read_bytes())
    for source in (one, other):
        evaluate([Run(source)], pixel_extractor(), tmp_path, options=OPTIONS)
    assert one.asked + other.asked == 90


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    """Evaluations side by side share a cache; what a killed one left behind is removed later."""
    shards = FeatureCache(tmp_path, {"a": 1}, 3, 3)
    now, old = (shards.folder / f".shard-00000.safetensors.host.{n}.partial" for n in range(2))
    for partial in (now, old):
        partial.touch()
    os.utime(old, (0, 0))
    shards.write(0, {"features": torch.zeros(3, 2)})
    assert (now.exists(), old.exists()) == (True, False)
    assert shards.is_finished(0)


def test_files_of_one_name_size_and_time_are_not_mistaken(tmp_path: Path) -> None:
    """As they are after unpacking with fixed times."""
    files = [tmp_path / name / "x.npy" for name in "ab"]
    for n, file in enumerate(files):
        file.parent.mkdir()
        np.save(file, IMAGES[60 * n : 60 * n + 60].numpy())
        os.utime(file, ns=(10**18, 10**18))
    found = evaluate([Run(ArraySource(file)) for file in files], pixel_extractor(), tmp_path / "cache")
    a, b = found.content["metrics"]["diversity"]["runs"]
    assert a != b
    files[0].write_bytes(files[1].read_bytes())  # and another content at the same place
    os.utime(files[0], ns=(10**18, 10**18))
    found = evaluate([Run(ArraySource(files[0]))], pixel_extractor(), tmp_path / "cache")
    assert found.value("diversity") == b


def test_classes_that_one_side_knows_are_the_others_too(tmp_path: Path) -> None:
    known, unknown = TensorSource("known", IMAGES[:60], LABELS[:60]), TensorSource("unknown", IMAGES[:60])
    for samples, teacher in ((known, unknown), (unknown, known)):
        found = evaluate([Run(samples, teacher)], digits_extractor(), tmp_path)
        assert found.value("diversity_ratio") == 1
        assert found.value("diversity") == found.value("diversity_of_teacher")
        assert found.content["by_group"]["diversity"].keys() == {str(n) for n in range(10)}
        assert found.value("class_accuracy") > 0.9


def test_prompts_of_a_folder_are_its_groups(tmp_path: Path) -> None:
    runs = [
        Run(TensorSource("x", IMAGES[:60]), prompts=["one", "two", "three"]),
        Run(TensorSource("x", IMAGES[:60], torch.arange(60) % 3)),
    ]
    found, expected = (evaluate([run], pixel_extractor(), tmp_path).content["by_group"]["diversity"] for run in runs)
    assert found == expected
    assert found.keys() == {"0", "1", "2"}


def test_what_cannot_be_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    source, short = Counted("x", IMAGES[:60], LABELS[:60]), Counted("y", IMAGES[60:70], LABELS[60:70])
    clip = Clip(save_clip(tmp_path / "clip"))
    cases: list[tuple[list[Run], str | None, str]] = [
        ([Run(source)], "frechet", "frechet cannot be measured: there is no reference"),
        ([Run(source)], "recall", "recall cannot be measured: there is no reference with images"),
        ([Run(source, source), Run(short)], "endpoint_mse", "endpoint_mse cannot be measured: there is no teacher"),
        ([Run(source)], "clip_score", "clip_score cannot be measured: there is no CLIP model, or there are no prompts"),
        ([Run(source, source), Run(short, source)], None, "x has 60 images, y has 10"),
        ([Run(source), Run(short), Run(source)], None, "3 runs have 2 different sets of samples"),
    ]
    for runs, metric, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(runs, pixel_extractor(), tmp_path, clip=clip, metrics=metric and [metric])
    assert (source.asked, short.asked) == (0, 0)


def test_identical_sets(tmp_path: Path) -> None:
    same = digits(0)
    found = evaluate([Run(same, same)], pixel_extractor(), tmp_path, reference=same, options=OPTIONS)
    assert found.value("frechet") == pytest.approx(0, abs=1e-8)
    assert found.value("endpoint_mse") == 0
    assert found.value("diversity_ratio") == 1
    assert (found.value("precision"), found.value("recall")) == (1, 1)
    assert found.value("mmd_rbf") < 0.01
    assert found.value("mmd_rbf_to_teacher") == pytest.approx(0, abs=1e-12)


def test_a_collapsed_student_is_seen(tmp_path: Path) -> None:
    """The right class, but always the same image of it."""
    firsts = torch.stack([IMAGES[label == LABELS][0] for label in LABELS[:300].tolist()])
    collapsed, honest = TensorSource("x", firsts, LABELS[:300]), digits(0, 300, noise=0.3)
    found = [evaluate([Run(s, digits(0, 300))], digits_extractor(), tmp_path) for s in (collapsed, honest)]
    assert found[0].value("diversity_ratio") == pytest.approx(0, abs=1e-6)
    assert found[0].value("coverage_of_teacher") < 0.5 < found[1].value("coverage_of_teacher")
    assert found[0].value("class_accuracy") == 1


def test_statistics_of_a_reference(tmp_path: Path) -> None:
    data = digits(500, 300)
    features = pixel_extractor()(data.batch(0, 300).images)["features"].double()
    statistics = Statistics(features.mean(0), features.T.cov())
    given: list[dict[str, Any]] = [{"reference": data}, {"statistics": statistics}]
    with_images, with_statistics = (evaluate([Run(digits(0))], pixel_extractor(), tmp_path, **each) for each in given)
    assert with_statistics.value("frechet") == pytest.approx(with_images.value("frechet"), rel=1e-9)
    assert with_statistics.content["left_out"]["precision"] == "there is no reference with images."
    small = Statistics(torch.zeros(5), torch.eye(5))
    with pytest.raises(ValueError, match="reference's mu has 5 features, the samples have 64"):
        evaluate([Run(digits(0))], pixel_extractor(), tmp_path, statistics=small, metrics=["frechet"])


def test_clip_score_of_prompts_in_turn(tmp_path: Path) -> None:
    clip = Clip(save_clip(tmp_path / "clip"))
    images = torch.cat([digits(0, 6).batch(0, 6).images] * 2)
    prompts = ["one", "two", "three"]
    found = evaluate([Run(TensorSource("x", images), prompts=prompts)], pixel_extractor(), tmp_path, clip=clip)
    assert found.value("clip_score") == pytest.approx(clip.scores(images, prompts * 4).mean().item(), rel=1e-6)
    others = evaluate(
        [Run(TensorSource("x", images), prompts=["two", "three", "one"])], pixel_extractor(), tmp_path, clip=clip
    )
    assert others.value("clip_score") != found.value("clip_score")


def test_too_few_samples_are_said(tmp_path: Path) -> None:
    found = evaluate([Run(digits(0, 30))], pixel_extractor(), tmp_path, reference=digits(30, 40))
    assert "frechet: 30 samples are too few for 64 features" in " ".join(found.content["warnings"])
    one = evaluate([Run(digits(0, 1))], pixel_extractor(), tmp_path, reference=digits(30, 40))
    assert "at least two samples" in one.content["left_out"]["frechet"]
    assert "at least 4 samples are needed, got 1" in one.content["left_out"]["precision"]
    assert "no class or prompt has two samples" in one.content["left_out"]["diversity"]
    with pytest.raises(ValueError, match=r"digits: frechet cannot be measured: .* needs at least two samples"):
        evaluate([Run(digits(0, 1))], pixel_extractor(), tmp_path, reference=digits(30, 40), metrics=["frechet"])


@pytest.mark.parametrize(
    ("runs", "metrics", "message"),
    [
        ([], None, "at least one set of samples"),
        ([Run(digits(0, 9), digits(0, 8, "t"))], None, "t has 8 images, digits has 9: a teacher's come from the same"),
        ([Run(digits(0, 9), digits(9, 9, "t"))], None, "digits and t differ in their classes or prompts"),
        (
            [Run(digits(0, 9), TensorSource("t", torch.zeros(9, 1, 4, 4)))],
            None,
            "digits beside t: .* must have one shape",
        ),
        ([Run(TensorSource("x", torch.full((3, 1, 2, 2), torch.nan)))], None, "x has NaN or infinity in 3 of 3 images"),
        ([Run(digits(0, 9))], ["fid"], "fid is a metric of Inception's features .*, not of pixels"),
        ([Run(digits(0, 9))], ["speed"], "no metric 'speed' with features of pixels, but frechet, "),
        ([Run(digits(0, 9))], ["precision"], "precision cannot be measured: there is no reference"),
        ([Run(digits(0, 9))], ["clip_score"], "clip_score cannot be measured: there is no CLIP model"),
    ],
)
def test_errors(tmp_path: Path, runs: list[Run], metrics: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(runs, pixel_extractor(), tmp_path, metrics=metrics)


def test_images_that_a_network_does_not_take_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: images must have shape \(B, 1, 8, 8\), got \(9, 3, 8, 8\)"):
        evaluate([Run(TensorSource("x", torch.zeros(9, 3, 8, 8)))], digits_extractor(), tmp_path)


def test_pictures_beside_a_network_in_pixel_space(tmp_path: Path) -> None:
    """What a picture cannot hold is no difference."""
    endpoints = ModelSource(open_model("digits:teacher"), range(10), 0, 10, {"num_inference_steps": 2})
    images = endpoints.batch(0, 10).images
    assert images.abs().max() > 1.1
    pictures = TensorSource("pictures", as_bytes(images), torch.arange(10))
    found = evaluate([Run(pictures, endpoints)], pixel_extractor(), tmp_path)
    assert 0 < found.value("endpoint_mse") < (1 / 255) ** 2


def test_options() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Options(batch_size=0)
