"""README and docs are true: their Python runs, their commands exist, the site builds without a warning."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer.main
from PIL import Image

from piflow.cli import app

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


def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert {path.stem for path in site.glob("*.html")} >= {path.stem for path in (ROOT / "docs").glob("*.md")}


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
