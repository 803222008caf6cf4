"""Results over runs: means with confidence intervals, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow.data.shards import write_whole
from piflow.evaluation.measure import INCEPTION_NAMES, METRICS, Values

CONFIDENCE = 0.95
FORMAT = 1


@dataclass(frozen=True)
class Report:
    """`content` in JSON's terms, the same bytes for the same evaluation: neither times nor the cache are in it."""

    content: dict[str, Any]

    def value(self, metric: str) -> float:
        """The mean of a metric over runs. Raises KeyError for one that was not measured."""
        return self.content["metrics"][metric]["mean"]

    def to_json(self) -> str:
        """Keys in a fixed order, numbers in full."""
        return json.dumps(self.content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """A table of metrics, and what a reader has to know of them."""
        return _markdown(self.content)

    def write(self, folder: Path | str) -> None:
        """results.json and results.md in a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", self.to_json().encode())
        write_whole(folder / "results.md", self.to_markdown().encode())


def summarised(runs: Sequence[Values], settings: dict[str, Any]) -> Report:
    """The report on the values of all runs; metrics that a run lacks are left out."""
    names = [name for name in runs[0].numbers if all(name in run.numbers for run in runs)]
    left_out = {name: reason for run in runs for name, reason in run.left_out.items()}
    warnings = list(dict.fromkeys(warning for run in runs for warning in run.warnings))
    return Report(
        {
            "format": FORMAT,
            "metrics": {name: over_runs([run.numbers[name] for run in runs]) for name in names},
            "by_group": {
                name: {
                    str(group): over_runs([run.by_group[name][group] for run in runs])
                    for group in runs[0].by_group[name]
                    if all(group in run.by_group[name] for run in runs)
                }
                for name in names
                if name in runs[0].by_group
            },
            "confidence": f"{CONFIDENCE:.0%} t-interval over {len(runs)} runs" if len(runs) > 1 else None,
            "warnings": warnings,
            "left_out": left_out,
            "settings": settings,
        }
    )


def over_runs(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and the ends of the t-interval of the mean; None for these where n is 1."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return {"mean": mean, "std": None, "low": None, "high": None, "runs": list(values)}
    from scipy.special import stdtrit

    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "low": mean - reach, "high": mean + reach, "runs": list(values)}


def _markdown(content: dict[str, Any]) -> str:
    settings, confidence = content["settings"], content["confidence"]
    here = {shown: key for key, shown in INCEPTION_NAMES.items()}
    lines = ["# Evaluation", "", *_sources(settings), ""]
    lines += [
        f"| metric | mean | {confidence or 'one run, no interval'} | better | what it is |",
        "|---|---:|---:|---|---|",
    ]
    for name, found in content["metrics"].items():
        metric = METRICS[here.get(name, name)]
        interval = "" if found["low"] is None else f"{found['low']:.5g} to {found['high']:.5g}"
        lines.append(f"| {name} | {found['mean']:.5g} | {interval} | {metric.better} | {_cell(metric.title)} |")
    for name, groups in content["by_group"].items():
        if 1 < len(groups) <= 100:
            lines += [
                "",
                f"{name} by class or prompt: " + ", ".join(f"{g} {v['mean']:.4g}" for g, v in groups.items()) + ".",
            ]
    for title, items in (
        ("To know", content["warnings"]),
        ("Not measured", [f"{name}: {reason}" for name, reason in content["left_out"].items()]),
    ):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


def _sources(settings: dict[str, Any]) -> list[str]:
    rows = [f"- samples: {name}, {count} images" for name, count in zip(settings["samples"], settings["num_samples"])]
    rows += [f"- teacher: {name}" for name in settings["teacher"] or ()]
    if (reference := settings["reference"]) is not None:
        rows.append(f"- reference: {reference['name']}, {reference['num_samples']} images")
    if settings["statistics"] is not None:
        rows.append(f"- for the Fréchet distance: {settings['statistics']}")
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    rows.append(f"- features: {settings['features']['name']}; {versions}")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
