"""Pages are what their stored results make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.plots import SOURCE, digest, draw, grouped
from benchmarks.report import BLOCKS, PAGES, ROOT, digits, regenerated


@pytest.mark.parametrize("page", PAGES)
def test_committed_pages_are_what_would_be_generated(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- generated:" in text
    assert regenerated(text) == text, "run python -m benchmarks.report"


@pytest.mark.parametrize("page", PAGES)
def test_committed_plots_show_the_committed_results(page: str) -> None:
    for image, stored in report.plotted_files((ROOT / page).read_text()).items():
        assert Image.open(image).text[SOURCE] == digest(stored), "run python -m benchmarks.report"


def row(candidate: str, median: float, **more: Any) -> dict[str, Any]:
    return {
        "suite": "kernels", "case": "qwen-image-1024", "operation": "gm_rollout", "pass": "forward", "device": "cpu",
        "candidate": candidate, "status": "ok", "note": "", "dtype": "float32", "substeps": 37, "batch": 1,
        "batch_of_model": 1,
        "network_output": [1, 8, 16, 128, 128], "error": 1.5e-7, "peak_bytes": 12_300_000,
        "ms": {"p20": median - 1, "p50": median, "p80": median + 1}, "rounds": 15, "floor_ms": 2.0,
        "work": {"bytes": 1e7, "multiply_adds": 2e8, "exponentials": 5e6}, "multiple_of_floor": median / 2, **more,
    }  # fmt: skip


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    file = tmp_path / "benchmarks" / "results" / "run_cpu.json"
    machine = {
        "gpu": "none", "processor": "A processor", "cores": 2, "python": "3.11", "torch": "2.13", "triton": "3.7",
        "diffusers": "0.42", "threads": 2,
    }  # fmt: skip
    rows = [
        row("reference", 120.0), row("ours", 20.0, speedup=6.0), row("ours, inductor", 7.0, speedup=120 / 7),
        row("reference, checkpointed", 40.0, speedup=3.0),
        {**row("reference, torch.compile", 0.0), "status": "out of memory", "note": "RuntimeError: a | b", "ms": {}},
    ]  # fmt: skip
    content = {
        "machine": machine, "settings": {"device": "cpu"}, "rows": rows, "wall_seconds": 660.0,
        "load_average": {"before": 0.1, "after": 1.0},
        "rates": {"bytes": 2e10, "multiply_adds": 1e11, "exponentials": 3e9, "probe": "made up"},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    return file


def page(*names: str) -> str:
    file = "benchmarks/results/run_cpu.json"
    return (
        "Before\n\n" + "\n".join(f"<!-- generated: {n} from {file} -->\nold\n<!-- end -->\n" for n in names) + "After\n"
    )


def test_a_page_is_made_anew(stored: Path, tmp_path: Path) -> None:
    made = regenerated(page("conditions", "suite-kernels", "headline", "plot"), tmp_path)
    assert made.startswith("Before\n\n<!-- generated: conditions")
    assert made.endswith("<!-- end -->\nAfter\n")
    assert "old" not in made
    assert "A processor, 2 cores; python 3.11, torch 2.13" in made
    assert "Floors from 20 GB/s, 100 G float32 multiply-adds/s and 3 G exponentials/s (made up)." in made
    assert "11 minutes, load average 0.1 before, 1.0 after" in made
    assert (
        "| qwen-image-1024 | `gm_rollout` | forward | ours | 19.0 | 20.0 | 21.0 | 12.3 | 10.0 | 6 | 1.5e-07 | 15 |  |"
        in made
    )
    assert "**out of memory**; RuntimeError: a / b |" in made
    assert "10 MB, 0.2 G multiply-adds, 0.005 G exponentials" in made
    assert (
        "| qwen-image-1024, `gm_rollout`, forward | 120 ms, 12.3 MB | 40.0 ms, 12.3 MB (checkpointed) | "
        "20.0 ms, 12.3 MB | 7 ms, 12.3 MB (inductor) | 6 to 17.1 | 2 to 5.71 |" in made
    )
    assert "(images/bench_cpu.png)" in made
    assert regenerated(made, tmp_path) == made


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    made = regenerated(page("suite-kernels"), tmp_path)
    assert "Not measured yet: benchmarks/results/run_cpu.json is not there." in made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page("kernel"), "generated: kernel: expected one of operators, digits"),
        ("<!-- generated: digits from x.json -->\n", "has no `<!-- end -->`"),
    ],
)
def test_errors_say_what_is_wrong(text: str, message: str, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        regenerated(text, tmp_path)


def test_the_command_rewrites_checks_and_draws(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report.regenerated, "__defaults__", (tmp_path,))
    monkeypatch.setattr(report.plotted_files, "__defaults__", (tmp_path,))
    file = tmp_path / "page.md"
    file.write_text(page("plot"))
    assert report.main(["--check", str(file)]) == 1
    assert file.read_text() == page("plot")
    assert report.main([str(file)]) == 0
    assert report.main(["--check", str(file)]) == 0
    image = tmp_path / "docs" / "images" / "bench_cpu.png"
    assert Image.open(image).text[SOURCE] == digest(stored)
    assert report.main(["--table", str(stored)]) == 0
    assert "| ours | 19.0 | 20.0 |" in capsys.readouterr().out


def test_a_plot_has_the_right_rows_only(stored: Path, tmp_path: Path) -> None:
    content = json.loads(stored.read_text())
    content["rows"].append(row("ours", 5.0, status="wrong", case="another"))
    groups = grouped(content["rows"])
    name = ("kernels", "qwen-image-1024", "gm_rollout", "forward")
    assert list(groups) == [name]
    assert [each["candidate"] for each in groups[name]] == [
        "reference", "ours", "ours, inductor", "reference, checkpointed",
    ]  # fmt: skip
    draw(content, tmp_path / "plot.png", source=stored)
    assert Image.open(tmp_path / "plot.png").width > 500


def test_a_part_of_a_batch_is_not_called_by_the_name_of_the_whole(stored: Path) -> None:
    part = row("ours", 20.0, batch=32, batch_of_model=512)
    assert "| qwen-image-1024 (32 of 512 samples) |" in report.markdown([part])
    assert next(iter(grouped([part])))[1] == "qwen-image-1024 (32 of 512 samples)"
    content = json.loads(stored.read_text()) | {"rows": [part], "file": "x.json"}
    assert "| qwen-image-1024 (32 of 512 samples), `gm_rollout`, forward | — |" in report.headline(content)


def test_one_call_has_no_percentiles() -> None:
    once = row("ours", 20.0, rounds=1)
    assert "| ours |  | 20.0 |  |  |" in report.markdown([once])
    assert grouped([once]) == {}


def test_three_digits() -> None:
    assert [digits(x) for x in (1234.5, 99.94, 12.34, 1.234, 0.01234, 2.0, None)] == [
        "1234", "99.9", "12.3", "1.23", "0.0123", "2", "",
    ]  # fmt: skip


def test_every_block_is_known_by_its_name() -> None:
    assert {"operators", "digits", "pipeline-share", "headline", "conditions", "plot", "suite-training"} <= set(BLOCKS)
