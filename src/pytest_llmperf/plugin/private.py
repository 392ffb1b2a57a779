"""What pytest has no public way for. All of it stands here; `tests/unit/test_private_pytest.py` fails first when it goes away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest


def renew(item: pytest.Item, properties: Sequence[tuple[str, Any]] = ()) -> None:
    """Give a test that has run before a fresh request, as `pytest-rerunfailures` does, and nothing of what its runs have left.

    That is captured output, which each report shows, and all properties but these.
    """
    if hasattr(item, "_initrequest"):
        item._initrequest()
    if hasattr(item, "_report_sections"):
        item._report_sections.clear()
    item.user_properties[:] = properties


def overrides(item: pytest.Item, fixture: str) -> bool:
    """Return whether a project's own fixture replaces ours: then only running it tells what is started.

    Which fixtures a test will use is known to pytest when it is collected.
    """
    info = getattr(item, "_fixtureinfo", None)
    return info is not None and len(info.name2fixturedefs.get(fixture, ())) > 1


def parameter(item: pytest.Item, name: str) -> Any:
    """Return the value that a test was parametrized with, None where it was not."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(name) if callspec else None


def calls(metafunc: pytest.Metafunc) -> list[Any]:
    """Return the parameters of each test that is generated, with `params` and `marks`; the list may be changed."""
    generated: list[Any] = metafunc._calls
    return generated


def read_again(config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Have pytest look for the first conftest.py files at the paths of these arguments, which were changed since it read them."""
    early = getattr(config, "known_args_namespace", None)
    if early is not None:
        early.file_or_dir = parser.parse_known_args(list(args)).file_or_dir


def terminal(config: pytest.Config) -> Any:
    """Return what writes to the terminal, None with -p no:terminal."""
    return config.pluginmanager.getplugin("terminalreporter")


def rewrite(report: pytest.TestReport, change: Callable[[str], str]) -> None:
    """Change every text of what a report says of a failure or a skip: message, source lines, and the values of variables."""
    report.longrepr = _rewritten(report.longrepr, change)


def rewrite_interrupt(config: pytest.Config, change: Callable[[str], str]) -> None:
    """Change every text of what the terminal will show of an interruption: with --full-trace the arguments of each function."""
    memo = getattr(terminal(config), "_keyboardinterrupt_memo", None)
    if memo is not None:
        _rewritten(memo, change)


def _rewritten(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        value[:] = [_rewritten(item, change) for item in value]
    elif isinstance(value, tuple):
        return tuple(_rewritten(item, change) for item in value)
    elif type(value).__module__.startswith("_pytest") and type(value).__name__.startswith(("Repr", "ExceptionChainRepr")):
        for name, item in vars(value).items():
            setattr(value, name, _rewritten(item, change))
    return value
