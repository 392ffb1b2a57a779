"""The import graph is the data flow (design.md, section 3): plan, measure, judge, report, plugin; and never upwards.

Read with `ast`, so that imports inside functions and under TYPE_CHECKING count too: an upward import, even of a type only,
means that something stands in the wrong file.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "pytest_llmperf"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

LAYERS: tuple[tuple[str, ...], ...] = (
    ("plan", "marker", "requirements", "corpus", "traffic", "judge.stats"),
    ("measure",),
    ("judge",),
    ("report",),
    ("",),  # the package itself, which names what is public
    ("plugin", "cli", "__main__"),
)
"""From the lowest up. A module belongs to the longest name that it begins with."""

OUTSIDE = "testing"
"""A package of its own: an engine that knows nothing of what tests it."""

FORBIDDEN = ("util", "manager", "registry", "factory", "helper", "misc", "common")


@dataclass(frozen=True)
class Import:
    """An import of a module of this package, or of pytest."""

    line: int
    target: str
    """The imported module, without the package's name; `pytest` for pytest and what belongs to it."""


def module_name(path: Path) -> str:
    """Return a file's module without the package's name; empty for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(module: str, source: str) -> list[Import]:
    """Return a module's imports of this package and of pytest, wherever in it they stand."""
    is_package = module in FILES and FILES[module].name == "__init__.py"
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                above = here[: len(here) - node.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            # `from package import module` imports a module too.
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found += [Import(node.lineno, name if inside(name) in FILES else base) for name in inner]
    ours = [Import(one.line, inside(one.target) or "") for one in found if inside(one.target) is not None]
    theirs = [Import(one.line, "pytest") for one in found if one.target.split(".")[0] in ("pytest", "_pytest", "pluggy")]
    return ours + theirs


def inside(name: str) -> str | None:
    """Return a full module name without the package's, None for other packages."""
    head, _, rest = name.partition(".")
    return rest if head == PACKAGE else None


def layer(module: str) -> int:
    """Return a module's layer, by the longest name in LAYERS that it begins with."""
    matches = [(len(name), number) for number, names in enumerate(LAYERS) for name in names if belongs(module, name)]
    assert matches, f"{module} has no layer: put it into LAYERS, and into design.md"
    return max(matches)[1]


def height(target: str) -> int:
    """Return the lowest layer that may import a module: only the plugin hands out the simulated engine."""
    return len(LAYERS) - 1 if belongs(target, OUTSIDE) else layer(target)


def belongs(module: str, name: str) -> bool:
    return module == name or (bool(name) and module.startswith(f"{name}."))


def upward(module: str, source: str) -> list[str]:
    """Return the imports of a module that go up, as `line: target`."""
    return [
        f"{one.line}: {one.target}"
        for one in imports(module, source)
        if one.target != "pytest" and height(one.target) > layer(module)
    ]


CORE = [module for module in FILES if not belongs(module, OUTSIDE)]


@pytest.mark.parametrize("module", CORE, ids=lambda module: module or PACKAGE)
def test_imports_go_down_only(module: str) -> None:
    assert upward(module, FILES[module].read_text()) == []


@pytest.mark.parametrize(
    "module", [module for module in CORE if not belongs(module, "plugin")], ids=lambda module: module or PACKAGE
)
def test_only_the_plugin_imports_pytest(module: str) -> None:
    assert [one.line for one in imports(module, FILES[module].read_text()) if one.target == "pytest"] == []


@pytest.mark.parametrize("module", [module for module in FILES if belongs(module, OUTSIDE)])
def test_the_simulated_engine_imports_nothing_of_the_package_but_itself(module: str) -> None:
    targets = [one for one in imports(module, FILES[module].read_text()) if one.target != "pytest"]
    assert [f"{one.line}: {one.target}" for one in targets if not belongs(one.target, OUTSIDE)] == []


@pytest.mark.parametrize("module", [module for module in CORE if module], ids=lambda module: module)
def test_nothing_below_the_plugin_imports_the_package_itself(module: str) -> None:
    # `from pytest_llmperf import Case` would go over the public names, which stand above.
    if layer(module) < len(LAYERS) - 1:
        assert [one.line for one in imports(module, FILES[module].read_text()) if one.target == ""] == []


def test_the_plugin_and_the_command_line_stand_side_by_side() -> None:
    for module, other in (("plugin", "cli"), ("cli", "plugin")):
        names = [name for name in FILES if belongs(name, module)]
        assert names
        assert [name for name in names for one in imports(name, FILES[name].read_text()) if belongs(one.target, other)] == []


def test_the_statistics_import_nothing_of_the_package() -> None:
    assert imports("judge.stats", FILES["judge.stats"].read_text()) == []


@pytest.mark.parametrize("module", FILES, ids=lambda module: module or PACKAGE)
def test_no_module_has_a_name_that_says_nothing(module: str) -> None:
    name = module.rpartition(".")[2]
    assert not [word for word in FORBIDDEN if word in name.lower()]
    assert name != "models"


def test_the_folders_are_those_of_the_design() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"measure", "judge", "report", "plugin", "cli", "testing", "models"}
    assert not list((SOURCE / "models").rglob("*.py"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from pytest_llmperf.measure import metrics"),
        ("plan", "import pytest_llmperf.judge.verdict"),
        ("judge.stats", "from pytest_llmperf.measure import client"),
        ("measure.client", "def f():\n    from pytest_llmperf.judge.verdict import Status"),
        ("measure", "if TYPE_CHECKING:\n    from pytest_llmperf.report import Outcome"),
        ("measure.engines.api", "from ...judge import verdict"),
        ("measure.engines", "from ...judge import verdict"),
        ("judge.verdict", "from pytest_llmperf.plugin import run"),
        ("report", "from pytest_llmperf.testing import Clock"),
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(module: str, source: str) -> None:
    assert len(upward(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("measure.client", "from pytest_llmperf.plan import Case"),
        ("judge.verdict", "from pytest_llmperf.judge import stats"),
        ("judge.verdict", "from . import stats"),
        ("measure.engines", "from .api import get"),
        ("plugin.run", "import pytest_llmperf"),
        ("plan", "import json"),
    ],
)
def test_a_downward_import_is_none_to_complain_of(module: str, source: str) -> None:
    assert upward(module, source) == []
