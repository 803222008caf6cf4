"""README and docs are true: their Python runs, their commands exist, the site builds without a warning."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer.main
from PIL import Image

from piflow.cli import app
from piflow.models.adapter_files import WEIGHTS
from tests.commands.runs import finished_run
from tests.data.bases import save_qwen_image
from tests.golden_vectors import GOLDEN
from tests.processes import no_shared_memory_left, time_limit

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in (ROOT / "docs").glob("*.md")} | {"README.md": ROOT / "README.md"}
OWN_TESTS = {"README.md", "own_teacher.md", "pipelines.md"}  # tests/test_readme.py, tests/models, tests/pipelines
MARK = r"<!-- needs a (?:download|GPU) -->\n"
BLOCKS = {
    name: re.findall(rf"({MARK})?^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    for name, path in PAGES.items()
}
COMMANDS = [
    (name, line.split("#")[0].strip())
    for name, path in PAGES.items()
    for line in re.findall(r"^ {4}((?:piflow|python|make|deepspeed) .*)$", path.read_text(), re.MULTILINE)
]

NOT_RUN_HERE = {
    r"piflow app --\w+": "needs a download",
    r"piflow evaluate samples.npz .*--inception": "needs a download",
    r"piflow train configs/qwen_image/\S+ --processes 8": "needs GPUs",
    r"piflow train configs/digits/\S+ (\[|--processes|iterations)": "takes minutes; `make demo` trains all of them",
    r"piflow evaluate outputs/\S+ --nfe 4 .*--seeds 0-2": "takes minutes; the README's, with one seed, is run",
    r"piflow cache-latents": "takes minutes at this size on a CPU: tests/data",
    r"piflow app": "serves until Ctrl-C: tests/apps/test_web.py",
}
"""Beginnings of commands of the pages, and why these tests only parse them."""
MARKS = {
    r"piflow train configs/tiny": pytest.mark.launcher,
    r"piflow (sample|evaluate .*--features|cache-prompts|export|plan|train configs/digits)": pytest.mark.slow,
}
RUN_HERE = [
    pytest.param(line, id=line, marks=[mark for beginning, mark in MARKS.items() if re.match(beginning, line)])
    for line in sorted({line for _, line in COMMANDS})
    if line.startswith("piflow ") and not any(re.match(beginning, line) for beginning in NOT_RUN_HERE)
]


BEFORE: dict[str, Callable[[Path], object]] = {
    "outputs/digits/nfe4": finished_run,
    "outputs/train/qwen-image-gm-4nfe-data-free": lambda folder: shutil.copytree(GOLDEN / "g08_gmqwen", folder),
    "my-adapter": lambda folder: shutil.copytree(GOLDEN / "g08_export_gmqwen", folder),
    WEIGHTS: lambda file: shutil.copy(GOLDEN / "g08_export_gmqwen" / WEIGHTS, file),
    "models/Qwen-Image": save_qwen_image,
    "prompts.txt": lambda file: file.write_text("a cat\na dog\n"),
}
"""What the pages have made, or expect to be there, before a command reads it; here at tiny size."""


@pytest.mark.parametrize("name", sorted(name for name in BLOCKS if BLOCKS[name] and name not in OWN_TESTS))
def test_python_of_a_page_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS[name]) == PAGES[name].read_text().count("```python")
    for folder in ("configs", "piflow_kernels"):
        (tmp_path / folder).symlink_to(ROOT / folder)  # pages are read in a checkout; what they write stays out of it
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for mark, block in BLOCKS[name]:
        tree = ast.parse(block, name)
        if mark:
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, name, "exec"), names)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_a_command_of_a_page_exists_with_its_options(page: str, command: str) -> None:
    program, *arguments = shlex.split(re.sub(r"\[[^\]]*\]", "", command))  # [optional parts]
    for argument in arguments:
        if re.fullmatch(r"(configs|examples|docs)/\S+\.\w+", argument) and "*" not in argument:
            assert (ROOT / argument).is_file(), argument
    if program == "piflow":
        _parse(typer.main.get_command(app), "piflow", arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {argument for argument in arguments if "=" not in argument} <= set(targets)
    elif "-m" in arguments or "--module" in arguments:
        option = "-m" if "-m" in arguments else "--module"
        assert importlib.util.find_spec(arguments[arguments.index(option) + 1]) is not None


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_of_a_page_runs(command: str, tmp_path: Path) -> None:
    """As it stands, in a shell, offline."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    words = shlex.split(command)
    read = [word for before, word in pairwise(words) if before not in ("--out", "--out-dir")]
    for name, make in BEFORE.items():
        if any(word == name or word.startswith(f"{name}/") for word in read):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            make(tmp_path / name)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with time_limit(300), no_shared_memory_left():
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--json" in words:
        assert json.loads(done.stdout)
    if words[1] == "sample":
        with Image.open(tmp_path / done.stdout.strip()) as grid:
            assert grid.convert("L").getextrema() == (0, 255)
    if "--out" in words or "--out-dir" in words:
        made = words[max(words.index(option) for option in ("--out", "--out-dir") if option in words) + 1]
        assert any((tmp_path / made).iterdir())


def test_what_is_not_run_is_on_the_pages() -> None:
    lines = [line for _, line in COMMANDS]
    for beginning in (*NOT_RUN_HERE, *MARKS):
        assert any(re.match(beginning, line) for line in lines), beginning


@pytest.mark.parametrize("page", sorted(PAGES))
def test_no_line_of_a_paragraph_is_taken_for_a_list(page: str) -> None:
    """A line that happens to begin with a plus, a dash or a number ends its paragraph and begins a list."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.MULTILINE | re.DOTALL)
    for before, line in pairwise(text.splitlines()):
        if re.match(r"([+*-]|\d+[.)]) ", line) and not re.match(r"\s*([+*-]|\d+[.)]) |  |<!--", before):
            assert not before.strip(), f"{before}\n{line}"


def _parse(command: click.Command, name: str, arguments: list[str]) -> None:
    """Raises click's usage errors: an option or a sub-command that does not exist."""
    with command.make_context(name, list(arguments), resilient_parsing=True) as context:
        if isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
            sub_name, sub_command, sub_arguments = command.resolve_command(context, rest)
            assert sub_command is not None, rest[0]
            _parse(sub_command, str(sub_name), sub_arguments)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "-q",
        "-d",
        str(folder / "doctrees"),
    ]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(folder / "site")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert {path.stem for path in site.glob("*.html")} >= {path.stem for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow
def test_the_reference_of_the_configuration_has_every_key(site: Path) -> None:
    from piflow.training.config import TrainConfig

    page = (site / "configuration.html").read_text()

    def keys(model: type) -> set[str]:
        found: set[str] = set()
        for key, field in model.model_fields.items():  # type: ignore[attr-defined]
            found.add(key)
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(part, "model_fields"):
                    found |= keys(part)
        return found

    text = re.sub(r"<[^>]+>", " ", page)
    assert {key for key in keys(TrainConfig) if not re.search(rf"\b{key}\b", text)} == set()
    assert "typing." not in text
    assert "FieldInfo" not in text


@pytest.mark.slow
def test_pages_that_stand_for_code_show_it(site: Path) -> None:
    assert "gm_mean_velocity_loss" in (site / "operators.html").read_text()
    examples = re.sub(r"<[^>]+>", "", (site / "examples.html").read_text())
    assert "<!-- file" not in examples
    assert examples.count("__main__") == len(list((ROOT / "examples").glob("*.py")))


def test_pictures_are_what_the_library_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "pictures.py"), run_name="__main__")
    for name in ("policy.png", "segments.png"):
        with Image.open(tmp_path / name) as drawn, Image.open(ROOT / "docs" / "images" / name) as stored:
            assert drawn.size == stored.size
            assert drawn.convert("L").getextrema()[0] < 100 < drawn.convert("L").getextrema()[1]
