"""The files of a model: those that ship with the package, and its config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_BUNDLED = Path(__file__).parents[2] / "models"


def bundled_model(name: str) -> Path | None:
    """Return the folder of a model that ships with the package (config and tokenizer, no weights), or None."""
    folder = _BUNDLED / name
    return folder if re.fullmatch(r"[\w.-]+", name) and (folder / "config.json").is_file() else None


def model_config(model: str) -> dict[str, Any]:
    """Return a model's config.json where it is a bundled or local folder, else an empty dict."""
    path = (bundled_model(model) or Path(model).expanduser()) / "config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}
