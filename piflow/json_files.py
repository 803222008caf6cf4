"""JSON that others wrote, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a file holds. Raises ValueError where it is no JSON or something else; OSError unchanged."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(content).__name__}.")
    return content
