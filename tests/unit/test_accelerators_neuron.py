"""NeuronCores, from documents of the Neuron tools as they are documented or were recorded; no hardware.

Where the documents come from, shortened, with invented instance ids:
- neuron_ls: the example in the "Neuron LS User Guide" of the AWS Neuron documentation (aws-neuron-sdk,
  tools/neuron-sys-tools/neuron-ls.rst), device 1 from the table above it.
- neuron_ls_container: after one recorded in a container on a trn2.48xlarge (runtime 2.34.10); numbers of a later device.
- neuron_monitor: two of four applications on an inf1.xlarge, recorded in a published copy of AWS's neuron-monitor-prometheus.py.
- neuron_monitor_trn2: the examples in the "Neuron Monitor User Guide" (tools/neuron-sys-tools/neuron-monitor-user-guide.rst).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.gpus.device import Accelerators, Gpu, Reading, Totals
from pytest_llmperf.measure.gpus.neuron import (
    Neuron,
    NeuronToolsError,
    find,
    parse_devices,
    parse_errors,
    parse_reading,
    run_command,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parent / "data"
MISSING: tuple[Any, ...] = ("N/A", None, "", {}, [], "absent")
GIB = 2**30
USED = 61766864 + 1295008 + 43216
PRINTS = "import json, os, signal, sys\n{}\nsys.stdout.flush(); signal.pause()"
"""A monitor: what it prints, then nothing more until it is ended."""


def text(name: str) -> str:
    return (DATA / f"neuron_{name}.json").read_text()


def load(name: str) -> Any:
    return json.loads(text(name))


def core(index: int, uuid: str, peers: list[int], name: str = "NeuronCore") -> Gpu:
    return Gpu(index=index, uuid=uuid, name=name, memory_bytes=24 * GIB, peers=tuple(peers), links=4)


def monitor_of(*documents: object) -> list[str]:
    lines = "\n".join(json.dumps(document) for document in documents)
    return [sys.executable, "-c", PRINTS.format(f"print({lines!r})")]


def with_errors(count: int, device: int = 0) -> dict[str, Any]:
    row = {"neuron_device_index": device, "mem_ecc_uncorrected": count, "sram_ecc_uncorrected": count}
    return {"neuron_runtime_data": [], "system_data": {"neuron_hw_counters": {"neuron_devices": [row], "error": ""}}}


@contextlib.contextmanager
def neuron(monitor: list[str], listed: str = "ls") -> Iterator[Neuron]:
    tools = Neuron("neuron-ls", monitor, lambda command: text(listed), Path("/nowhere"))
    try:
        yield tools
    finally:
        tools.close()


# --- what there is -------------------------------------------------------------------------------------------------
def test_a_device_is_its_cores_which_share_its_memory() -> None:
    near = list(range(8))
    expected = [core(i, f"neuron-{'cc' if i < 4 else 'b5'}:00.0-{i % 4}", [peer for peer in near if peer != i]) for i in range(8)]
    assert list(parse_devices(text("ls")).items()) == [(gpu, gpu.index // 4) for gpu in expected]


def test_newer_tools_tell_the_numbers_of_cores_and_the_instance() -> None:
    uuids = {12 + i: f"neuron-0000:e1:00.0-{i}" for i in range(4)}
    name = "NeuronCore (trn2.48xlarge)"
    expected = {core(i, uuid, [peer for peer in uuids if peer != i], name): 3 for i, uuid in uuids.items()}
    assert parse_devices(text("ls_container")) == expected


def test_cores_of_devices_without_links_have_only_each_other() -> None:
    rows = load("ls")
    for row in rows:
        row["connected_to"] = None
    cores = parse_devices(json.dumps(rows))
    assert [(gpu.peers, gpu.links) for gpu in cores] == [
        *[(tuple(i for i in range(4) if i != own), 0) for own in range(4)],
        *[(tuple(i for i in range(4, 8) if i != own), 0) for own in range(4, 8)],
    ]


@pytest.mark.parametrize("listed", ["[]", "null"])
def test_a_host_may_have_no_devices(listed: str) -> None:
    assert parse_devices(listed) == {}


def test_it_is_one_of_the_accelerators(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("2.22.2.0\n")
    tools: Accelerators = Neuron(run=lambda command: text("ls"), driver=tmp_path / "version")
    assert (tools.vendor, tools.visible_variable) == ("aws", "NEURON_RT_VISIBLE_CORES")
    assert tools.versions == {"driver": "2.22.2.0"}
    assert tools.devices() == tuple(parse_devices(text("ls")))
    tools.close()


def test_without_a_driver_there_is_no_version() -> None:
    assert Neuron(driver=Path("/nowhere")).versions == {}


# --- what they do --------------------------------------------------------------------------------------------------
def test_an_application_uses_the_cores_that_it_has_memory_on() -> None:
    readings = [parse_reading(text("monitor"), index, processes=True) for index in range(4)]
    assert readings == [
        Reading(used_bytes=USED, processes={20843: USED}, utilization=2.926414908153532 / 100),
        Reading(used_bytes=USED, processes={21050: USED}, utilization=3.0803098003189486 / 100),
        Reading(used_bytes=0, processes={}, utilization=0.0),
        Reading(used_bytes=0, processes={}, utilization=0.0),
    ]


def test_processes_are_told_only_where_they_are_asked_for() -> None:
    assert parse_reading(text("monitor"), 0, processes=False).processes is None


def test_a_core_that_no_application_lists_is_not_told() -> None:
    used = 193986816 + 176285056 + 20971520
    readings = [parse_reading(text("monitor_trn2"), index, processes=True) for index in (1, 2)]
    assert readings == [
        Reading(used_bytes=used, processes={4711: used}, utilization=0.4202),
        Reading(processes={}),
    ]


def test_an_application_that_lists_only_its_cores_says_nothing_of_others() -> None:
    document = load("monitor")
    for runtime, own in zip(document["neuron_runtime_data"], "01", strict=True):
        report = runtime["report"]
        usage = report["memory_used"]["neuron_runtime_used_bytes"]["usage_breakdown"]
        usage["neuroncore_memory_usage"] = {own: usage["neuroncore_memory_usage"][own]}
        counters = report["neuroncore_counters"]
        counters["neuroncores_in_use"] = {own: counters["neuroncores_in_use"][own]}
    for index in (0, 1):
        assert parse_reading(json.dumps(document), index, processes=True) == parse_reading(text("monitor"), index, processes=True)


def test_no_application_at_all_is_nothing_in_use() -> None:
    document = json.dumps({"neuron_runtime_data": [], "system_data": {}})
    assert parse_reading(document, 0, processes=True) == Reading(used_bytes=0, processes={}, utilization=0.0)


@pytest.mark.parametrize("group", ["memory_used", "neuroncore_counters"])
def test_an_error_of_a_group_means_that_it_is_not_told(group: str) -> None:
    document = load("monitor")
    document["neuron_runtime_data"][0]["report"][group]["error"] = "device is busy"
    reading = parse_reading(json.dumps(document), 0, processes=True)
    before = parse_reading(text("monitor"), 0, processes=True)
    if group == "memory_used":
        assert reading == Reading(processes={20843: None}, utilization=before.utilization)
    else:
        assert reading == Reading(used_bytes=before.used_bytes, processes=before.processes)


def test_an_error_of_an_application_leaves_every_core_untold() -> None:
    document = load("monitor")
    document["neuron_runtime_data"][1]["error"] = "timeout"
    readings = [parse_reading(json.dumps(document), index, processes=True) for index in (0, 3)]
    assert readings == [Reading(processes={20843: USED, 21050: None}), Reading(processes={21050: None})]


def test_errors_are_those_of_memory_and_of_the_cores_sram() -> None:
    assert parse_errors(text("monitor")) == {0: 0}
    assert parse_errors(json.dumps(with_errors(2, device=3))) == {3: 4}


# --- the monitor ---------------------------------------------------------------------------------------------------
def test_one_monitor_is_started_at_the_first_reading_and_ended_by_close() -> None:
    prints = "print(json.dumps({'system_data': {}, 'neuron_runtime_data': [{'pid': os.getpid()}]}))"
    with neuron([sys.executable, "-c", PRINTS.format(prints)]) as tools:
        gpus = tools.devices()[:1]
        first, second = (tools.read(gpus, processes=True)[0] for _ in range(2))
        assert first == second
        (pid,) = first.processes or {}
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(NeuronToolsError, match="has ended"):
        tools.read(gpus, processes=True)


def test_the_monitor_is_asked_for_what_is_read_each_second() -> None:
    prints = "print(json.dumps({'system_data': {}, 'neuron_runtime_data': json.load(open(sys.argv[2]))}))"
    with neuron([sys.executable, "-c", PRINTS.format(prints)]) as tools, pytest.raises(NeuronToolsError) as caught:
        tools.read(tools.devices(), processes=False)
    assert "found {'period': '1s', 'neuron_runtimes': [{'tag_filter': '.*', 'metrics':" in str(caught.value)


def test_without_a_reading_no_monitor_is_started() -> None:
    with neuron(["/nowhere/neuron-monitor"]) as tools:
        assert len(tools.devices()) == 8


def test_a_monitor_that_ends_is_an_error_with_its_last_words() -> None:
    command = [sys.executable, "-c", "import sys; print('no driver', file=sys.stderr)"]
    with neuron(command) as tools, pytest.raises(NeuronToolsError, match="has ended; its last words: no driver"):
        tools.read(tools.devices(), processes=False)


def test_a_monitor_that_is_not_there_is_an_error() -> None:
    with neuron(["/nowhere/neuron-monitor"]) as tools, pytest.raises(NeuronToolsError, match="could not be run"):
        tools.read(tools.devices(), processes=False)


def test_a_monitor_that_tells_nothing_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llmperf.measure.gpus.neuron.STALE_S", 0.0)
    with neuron(monitor_of(with_errors(0))) as tools, pytest.raises(NeuronToolsError, match="tells nothing"):
        tools.read(tools.devices(), processes=False)


def test_errors_of_all_periods_count_for_every_core_of_the_device() -> None:
    with neuron(monitor_of(with_errors(1), with_errors(0), with_errors(2))) as tools:
        gpus = tools.devices()
        end = time.monotonic() + 10
        while (totals := tools.totals(gpus)) != [Totals(uncorrected_errors=6)] * 4 + [Totals()] * 4:
            assert time.monotonic() < end, totals


# --- what is wrong -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("printed", ["", "No neuron devices found", "{}", "[3]", '"N/A"', '[{"neuron_device": 0}]'])
def test_a_list_that_is_not_as_documented_is_an_error(printed: str) -> None:
    with pytest.raises(NeuronToolsError, match=r"`neuron-ls -j` should .*; found"):
        parse_devices(printed)


@pytest.mark.parametrize("field", ["neuron_device", "nc_count", "memory_size", "bdf"])
def test_a_device_without_number_cores_memory_or_address_is_an_error(field: str) -> None:
    rows = load("ls")
    rows[0][field] = "N/A" if field != "bdf" else None
    with pytest.raises(NeuronToolsError, match="should tell neuron_device, nc_count, memory_size, bdf"):
        parse_devices(json.dumps(rows))


@pytest.mark.parametrize("printed", ["", "[]", "{}", "3", '{"neuron_runtime_data": 3}', '{"neuron_runtime_data": [3]}'])
def test_a_report_that_is_not_as_documented_is_an_error(printed: str) -> None:
    with pytest.raises(NeuronToolsError, match=r"`neuron-monitor` should .*; found"):
        parse_reading(printed, 0, processes=True)


def test_a_command_that_fails_is_an_error_with_its_last_words() -> None:
    assert run_command([sys.executable, "-c", "print('[]')"]) == "[]\n"
    with pytest.raises(NeuronToolsError, match="failed: no driver"):
        run_command([sys.executable, "-c", "import sys; print('no driver', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(NeuronToolsError, match="could not be run"):
        run_command(["/nowhere/neuron-ls"])


# --- where it runs -------------------------------------------------------------------------------------------------
def fails(command: list[str]) -> str:
    raise NeuronToolsError("no devices")


@pytest.mark.parametrize("missing", ["neuron-ls", "neuron-monitor"])
def test_without_the_tools_there_are_no_cores(missing: str) -> None:
    assert find(lambda name, path: None if name == missing else f"/bin/{name}", lambda command: text("ls")) is None


def test_a_tool_that_lists_nothing_means_no_cores() -> None:
    assert find(lambda name, path: f"/bin/{name}", lambda command: "[]") is None
    assert find(lambda name, path: f"/bin/{name}", fails) is None


def test_a_tool_that_lists_devices_is_used() -> None:
    asked = list[list[str]]()

    def run(command: list[str]) -> str:
        asked.append(command)
        return text("ls")

    tools = find(lambda name, path: f"/bin/{name}", run)
    assert tools is not None
    assert len(tools.devices()) == 8
    assert asked == [["/bin/neuron-ls", "-j"]] * 2


# --- what is not told ----------------------------------------------------------------------------------------------
def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every object and list in a document with every key in it."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in [(document, key), *places(document[key])]]


@st.composite
def with_a_gap(draw: st.DrawFn, name: str) -> str:
    """Return a document in which one field is absent or not told."""
    document = load(name)
    where, key = draw(st.sampled_from([place for place in places(document) if isinstance(place[0], dict)]))
    put = draw(st.sampled_from(MISSING))
    if put != "absent":
        where[key] = put
    else:
        del where[key]
    return json.dumps(document)


@given(st.sampled_from(["monitor", "monitor_trn2"]).flatmap(lambda name: st.tuples(st.just(name), with_a_gap(name))))
@settings(max_examples=300, deadline=None)
def test_what_a_report_does_not_tell_is_never_0(drawn: tuple[str, str]) -> None:
    name, document = drawn
    for index in range(4):
        before = parse_reading(text(name), index, processes=True)
        try:
            reading = parse_reading(document, index, processes=True)
        except NeuronToolsError:
            continue
        if json.loads(document).get("neuron_runtime_data") == []:
            continue  # an empty list says that there is no application
        zeros = {field for field, value in asdict(reading).items() if value == 0}
        assert zeros <= {field for field, value in asdict(before).items() if value == 0}
        assert 0 not in (reading.processes or {}).values()


@given(with_a_gap("monitor"))
@settings(max_examples=100, deadline=None)
def test_errors_that_are_not_told_are_no_zeros(document: str) -> None:
    errors = json.loads(document.replace('ecc_uncorrected": 0', 'ecc_uncorrected": 2'))
    with contextlib.suppress(NeuronToolsError):
        assert parse_errors(json.dumps(errors)) in ({0: 4}, {})


@given(st.sampled_from(["ls", "ls_container"]).flatmap(with_a_gap))
@settings(max_examples=200, deadline=None)
def test_what_a_device_does_not_tell_is_never_0(document: str) -> None:
    with contextlib.suppress(NeuronToolsError):
        assert all(gpu.memory_bytes > 0 and gpu.name and gpu.uuid for gpu in parse_devices(document))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda it: st.lists(it) | st.dictionaries(st.text(), it),
    )
)
@settings(max_examples=100, deadline=None)
def test_no_document_raises_anything_but_the_documented_error(document: object) -> None:
    for printed in (json.dumps(document), json.dumps({"neuron_runtime_data": document, "system_data": document})):
        for parse in (parse_devices, parse_errors, lambda it: parse_reading(it, 0, processes=True)):
            with contextlib.suppress(NeuronToolsError):
                parse(printed)
