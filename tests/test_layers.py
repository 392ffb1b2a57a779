"""The import graph is the data flow: units, plan, judge's mathematics, measure, judge, report, run, then plugin beside cli.

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
    ("units", "files"),
    ("plan",),
    ("judge.maths",),
    ("measure",),
    ("judge",),
    ("report",),
    ("",),  # the package itself, which names what is public, and has the version
    ("run",),
    ("plugin", "cli", "__main__"),
)
"""From the lowest up. A module belongs to the longest name that it begins with."""

OUTSIDE = "testing"
"""A package of its own: an engine that knows nothing of what tests it."""

SCRIPTS = ("measure.engines.supervisor", "measure.engines.remains", "measure.engines.host_llm", "measure.engines.launch_vllm")
"""They are run by interpreters that may not have this package."""

FORBIDDEN = ("util", "manager", "registry", "factory", "helper", "misc", "common")
PYTEST = ("pytest", "_pytest", "pluggy")


@dataclass(frozen=True)
class Import:
    """An import of a module of this package, or of another one."""

    line: int
    target: str
    """The imported module; of this package without its name, of others their first name behind a `!`."""
    is_type: bool
    """It stands under TYPE_CHECKING."""


def module_name(path: Path) -> str:
    """Return a file's module without the package's name; empty for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(module: str, source: str) -> list[Import]:
    """Return a module's imports, wherever in it they stand."""
    is_package = module in FILES and FILES[module].name == "__init__.py"
    tree = ast.parse(source)
    guarded = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    types = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
    names: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                above = here[: len(here) - node.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            # `from package import module` imports a module too.
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names += [(node, name if inside(name) in FILES else base) for name in inner]
    return [Import(node.lineno, _target(name), id(node) in types) for node, name in names]


def _target(name: str) -> str:
    ours = inside(name)
    return f"!{name.partition('.')[0]}" if ours is None else ours


def inside(name: str) -> str | None:
    """Return a full module name without the package's, None for other packages."""
    head, _, rest = name.partition(".")
    return rest if head == PACKAGE else None


def of_module(module: str) -> list[Import]:
    return imports(module, FILES[module].read_text())


def layer(module: str) -> int:
    """Return a module's layer, by the longest name in LAYERS that it begins with."""
    matches = [(len(name), number) for number, names in enumerate(LAYERS) for name in names if belongs(module, name)]
    assert matches, f"{module} has no layer: put it into LAYERS"
    return max(matches)[1]


def height(target: str) -> int:
    """Return the lowest layer that may import a module: only the plugin hands out the simulated engine."""
    return len(LAYERS) - 1 if belongs(target, OUTSIDE) else layer(target)


def belongs(module: str, name: str) -> bool:
    return module == name or (bool(name) and module.startswith(f"{name}."))


def upward(module: str, source: str) -> list[str]:
    """Return the imports of a module that go up, as `line: target`."""
    return [
        f"{found.line}: {found.target}"
        for found in imports(module, source)
        if not found.target.startswith("!") and height(found.target) > layer(module)
    ]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other, each sorted."""
    reached: dict[str, set[str]] = {}
    for module in edges:
        seen, todo = set[str](), [module]
        while todo:
            fresh = edges[todo.pop()] - seen
            seen |= fresh
            todo += fresh
        reached[module] = seen
    groups = {frozenset(other for other in reached[one] if one in reached[other]) for one in edges if one in reached[one]}
    return sorted(map(sorted, groups))


def graph(*, types: bool) -> dict[str, set[str]]:
    """Return which modules each module imports; of types too, or at run time only (inside functions counts)."""
    return {
        module: {found.target for found in of_module(module) if found.target in FILES and (types or not found.is_type)} - {module}
        for module in FILES
    }


CORE = [module for module in FILES if not belongs(module, OUTSIDE)]
NAMED = {"ids": lambda module: module or PACKAGE}


@pytest.mark.parametrize("module", CORE, **NAMED)
def test_imports_go_down_only(module: str) -> None:
    assert upward(module, FILES[module].read_text()) == []


@pytest.mark.parametrize("types", [False, True], ids=["at run time", "with types"])
def test_no_file_imports_itself_by_way_of_others(types: bool) -> None:
    assert circles(graph(types=types)) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


@pytest.mark.parametrize("module", [module for module in CORE if not belongs(module, "plugin")], **NAMED)
def test_only_the_plugin_imports_pytest(module: str) -> None:
    assert [found.line for found in of_module(module) if found.target.removeprefix("!") in PYTEST] == []


@pytest.mark.parametrize("module", [module for module in FILES if belongs(module, OUTSIDE)])
def test_the_simulated_engine_imports_nothing_of_the_package_but_itself(module: str) -> None:
    targets = [found for found in of_module(module) if not found.target.startswith("!")]
    assert [f"{found.line}: {found.target}" for found in targets if not belongs(found.target, OUTSIDE)] == []


@pytest.mark.parametrize("module", [module for module in CORE if module and layer(module) < len(LAYERS) - 1])
def test_nothing_below_the_plugin_imports_public_names(module: str) -> None:
    # `from pytest_llmperf import Case` would go over the public names, which stand above; `run` asks for the version.
    assert [found.line for found in of_module(module) if found.target == "" and not belongs(module, "run")] == []


def test_the_plugin_and_the_command_line_stand_side_by_side() -> None:
    for module, other in (("plugin", "cli"), ("cli", "plugin")):
        names = [name for name in FILES if belongs(name, module)]
        assert names
        assert [name for name in names for found in of_module(name) if belongs(found.target, other)] == []


@pytest.mark.parametrize("module", [module for module in FILES if belongs(module, "judge.maths")])
def test_the_mathematics_import_numpy_and_scipy_and_nothing_else(module: str) -> None:
    standard = {"!__future__", "!collections", "!dataclasses", "!math", "!statistics", "!typing"}
    others = {found.target for found in of_module(module) if not belongs(found.target, "judge.maths")}
    assert others <= {"!numpy", "!scipy"} | standard


@pytest.mark.parametrize("module", SCRIPTS)
def test_scripts_stand_alone(module: str) -> None:
    assert [found for found in of_module(module) if not found.target.startswith("!")] == []


@pytest.mark.parametrize("module", FILES, **NAMED)
def test_no_module_has_a_name_that_says_nothing(module: str) -> None:
    name = module.rpartition(".")[2]
    assert not [word for word in FORBIDDEN if word in name.lower()]
    assert name != "models"


def test_names_of_tests_have_twelve_words_at_most() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.rglob("test_*.py")]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith("test_") and len(name.split("_")) > 13] == []


def test_the_rooms_are_those_of_the_house() -> None:
    folders = {path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")} - {"."}
    measure = {"measure", "measure/client", "measure/engines", "measure/gpus", "measure/host"}
    assert folders == {"plan", *measure, "judge", "judge/maths", "report", "run", "plugin", "cli", "testing"}
    assert not list((SOURCE / "models").rglob("*.py"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan.engine", "from pytest_llmperf.measure import metrics"),
        ("plan.engine", "import pytest_llmperf.judge.verdict"),
        ("judge.maths.stats", "from pytest_llmperf.measure import client"),
        ("measure.client.endpoint", "def f():\n    from pytest_llmperf.judge.verdict import Status"),
        ("measure.launch", "if TYPE_CHECKING:\n    from pytest_llmperf.report.outcome import Outcome"),
        ("measure.engines.api", "from ...judge import verdict"),
        ("measure.engines", "from ...judge import verdict"),
        ("judge.verdict", "from pytest_llmperf.run import rules"),
        ("run.rules", "from pytest_llmperf.plugin import state"),
        ("report.outcome", "from pytest_llmperf.testing import Clock"),
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(module: str, source: str) -> None:
    assert len(upward(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("measure.launch", "from pytest_llmperf.plan.case import Case"),
        ("judge.verdict", "from pytest_llmperf.judge.maths import stats"),
        ("judge.verdict", "from .maths import stats"),
        ("measure.engines", "from .api import get"),
        ("plugin.session", "import pytest_llmperf"),
        ("plan.engine", "import json"),
    ],
)
def test_a_downward_import_is_none_to_complain_of(module: str, source: str) -> None:
    assert upward(module, source) == []
