"""The site of docs/ (`make docs`): the Markdown pages, pages from the code, and links out of docs/ led back into it."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

import piflow

ROOT = Path(__file__).parent.parent
OPERATORS = "piflow_kernels/README.md"

project = "piflow"
version = release = piflow.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "piflow"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"


def setup(app: Sphinx) -> None:
    """Sphinx's entry point."""
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", preformatted)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Fill pages that stand for something in the code, and lead links to the code to where the site shows it.

    `<!-- file: examples/x.py -->` becomes the file itself.
    """
    if name == "operators":
        page = (ROOT / OPERATORS).read_text(encoding="utf-8").replace("](../docs/", "](")
        source[0] = page.replace("# piflow_kernels", "# Operators", 1)
    if name == "configuration":
        source[0] = configuration_reference()
    page = source[0].replace(f"](../{OPERATORS})", "](operators.md)").replace("](../examples)", "](examples.md)")
    page = re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples.md#\1)", page)
    source[0] = re.sub(r"<!-- file: (\S+\.py) -->", _listing, page)


def preformatted(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read as they stand: keep their lines, formulas and lists."""
    lines[:] = [".. code-block:: text", "", *(f"    {line}" for line in lines), ""]


def configuration_reference() -> str:
    """Every key of a training's YAML, with type and default, from the typed configuration itself."""
    from piflow.training.config import TrainConfig

    parts = [
        "# Configuration",
        "A training is one YAML file. A key that is not listed here is an error that names the nearest right one; "
        "every key can be given on the command line as well: `optimizer.learning_rate=1e-4`. `base: FILE` on top of a "
        "file takes another one's keys. `piflow train CONFIG --dry-run` prints what a file resolves to. The recipes in "
        "`configs/` are the place to begin.",
    ]
    for name, section in [("", TrainConfig), *_sections(TrainConfig)]:
        parts.append(f"## {name or 'The run'}")
        parts.append(_paragraphs(section.__doc__ or ""))
        rows = [
            f"| `{key}` | {_type(field.rebuild_annotation())} | {_default(field)} |"
            for key, field in section.model_fields.items()
            if _section(field.annotation) is None or field.default is None
        ]
        parts.append("\n".join(["| key | value | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    found = []
    for key, field in model.model_fields.items():
        if section := _section(field.annotation):
            found += [(prefix + key, section), *_sections(section, f"{prefix}{key}.")]
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _type(annotation: Any) -> str:
    """A type as a person writes it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [_bound(item) for meta in args[1:] for item in getattr(meta, "metadata", [meta])]
        return ", ".join([_type(args[0]), *dict.fromkeys(filter(None, bounds))])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (UnionType, Union):
        return " or ".join(_type(part) for part in args)
    if origin is tuple:
        return "list of " + " and ".join(dict.fromkeys(_type(part) for part in args if part is not Ellipsis))
    if origin is dict:
        return "keys and values"
    section = _section(annotation)
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path", type(None): "null"}
    return "the keys below" if section else names.get(annotation, str(annotation))


def _bound(meta: Any) -> str | None:
    for name, sign in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
        if getattr(meta, name, None) is not None:
            return f"{sign} {getattr(meta, name)}"
    return None


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _paragraphs(docstring: str) -> str:
    return "\n".join(line.strip() for line in docstring.strip().splitlines())


def _listing(found: re.Match[str]) -> str:
    return f"```python\n{(ROOT / found[1]).read_text(encoding='utf-8')}```"
