"""What pytest has no public way for: each of these fails first when a new pytest takes it away."""

from __future__ import annotations

import argparse

import pytest

from pytest_llmperf.plugin.private import calls, overrides, parameter, read_again, renew, terminal


@pytest.fixture
def ours() -> str:
    return "a file's own fixture"


def test_a_request_can_be_renewed(request: pytest.FixtureRequest) -> None:
    item = request.node
    before = item._request
    renew(item)
    assert item._request is not before
    assert hasattr(item, "_initrequest")


class TestOverriding:
    @pytest.fixture
    def ours(self, ours: str) -> str:
        return f"{ours}, in a class"

    def test_a_fixture_in_place_of_another_is_seen(self, request: pytest.FixtureRequest, ours: str) -> None:
        assert ours == "a file's own fixture, in a class"
        assert overrides(request.node, "ours")


def test_a_fixture_that_replaces_none_is_no_override(request: pytest.FixtureRequest, ours: str) -> None:
    assert not overrides(request.node, "ours")
    assert not overrides(request.node, "nobody's")


@pytest.mark.parametrize("number", [7])
def test_a_parameter_is_found_by_its_name(request: pytest.FixtureRequest, number: int) -> None:
    assert parameter(request.node, "number") == number
    assert parameter(request.node, "other") is None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "generated" in metafunc.fixturenames:
        metafunc.parametrize("generated", [1, pytest.param(2, marks=pytest.mark.skipif(False, reason="")), 3])
        calls(metafunc)[:] = [call for call in calls(metafunc) if call.marks and call.params["generated"] == 2]


def test_generated_tests_can_be_taken_away_by_their_marks_and_parameters(generated: int) -> None:
    assert generated == 2


def test_the_terminal_can_be_written_to(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> None:
    reporter = terminal(pytestconfig)
    if reporter is None:  # a worker of xdist has none
        assert hasattr(pytestconfig, "workerinput")
    else:
        assert all(hasattr(reporter, name) for name in ("write_line", "section", "rewrite", "ensure_newline", "isatty"))


def test_paths_are_read_anew_where_arguments_have_changed(pytestconfig: pytest.Config) -> None:
    class Early:
        known_args_namespace = argparse.Namespace(file_or_dir=["old"])

    class Parser:
        def parse_known_args(self, args: list[str]) -> argparse.Namespace:
            return argparse.Namespace(file_or_dir=args)

    read_again(Early(), Parser(), ["new"])  # type: ignore[arg-type]  # what is asked of them is all here
    assert Early.known_args_namespace.file_or_dir == ["new"]
    assert hasattr(pytestconfig, "known_args_namespace")
