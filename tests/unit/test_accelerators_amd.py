"""AMD GPUs, from documents of `amd-smi` as they are documented or were recorded; no hardware.

Where the documents come from, all shortened to the sections that are read, with invented serial numbers:
- amd_smi_list, _static, _static_rocm7, _process, _version: the names and units that the command's own source stores
  (ROCm/rocm-systems, projects/amdsmi/amdsmi_cli/subcommands), with values of an MI300X; before ROCm 7 static told
  `limit.socket_power` (ROCm/amdsmi, amdsmi_cli/amdsmi_commands.py). A recorded `version` stands in the tests of ROCm/cvs.
- amd_smi_topology, _topology_pcie: examples in the change log of ROCm/amdsmi ("Updated `amd-smi topology --json`").
- amd_smi_metric: the same source, `throttle` as in the change log (ROCm 6.3) and user guide of AMD SMI.
- amd_smi_metric_radeon: recorded on a host with two Radeons, in the tests of the project gpu-notifier.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.gpus.amd import (
    Amd,
    AmdSmiError,
    CommandFailedError,
    find,
    parse_devices,
    parse_metric,
    parse_processes,
    parse_versions,
    run_command,
)
from pytest_llmperf.measure.gpus.device import POWER_CAP, THERMAL, Accelerators, Gpu, Reading, Totals

DATA = Path(__file__).parent / "data"
FIRST = Gpu(
    index=0,
    uuid="7eff74a0-0000-1000-808f-7e20764e2714",
    name="AMD Instinct MI300X",
    memory_bytes=196592 * 2**20,
    peers=(1,),
    links=1,
    sm_clock_mhz=2100.0,
    power_limit_w=750.0,
)
SECOND = replace(FIRST, index=1, uuid="b6ff74a0-0000-1000-80ae-7c8cefe1f084", peers=(0,))
BUSY = Reading(
    used_bytes=121344 * 2**20,
    sm_clock_mhz=2100.0,
    utilization=0.97,
    temperature_c=71.0,
    limits=(POWER_CAP, THERMAL),
)
IDLE = Reading(
    used_bytes=284 * 2**20,
    sm_clock_mhz=132.0,
    utilization=0.0,
    temperature_c=38.0,
)
MISSING: tuple[Any, ...] = ("N/A", None, "", {}, [], "absent")


def text(name: str) -> str:
    return (DATA / f"amd_smi_{name}.json").read_text()


def load(name: str) -> Any:
    return json.loads(text(name))


class Host:
    """A host whose `amd-smi` prints these documents; commands that it lacks fail."""

    def __init__(self, **documents: str) -> None:
        every = {name: text(name) for name in ("static", "metric", "process", "topology", "version")}
        self.documents = {"list -e": text("list"), "list": text("list")} | every | documents

    def run(self, command: list[str]) -> str:
        assert command[0] == "/opt/rocm/bin/amd-smi"
        assert command[-1] == "--json"
        document = self.documents[" ".join(command[1:-1])]
        if document == "fails":
            raise CommandFailedError("no such command")
        return document

    def open(self) -> Amd:
        return Amd("/opt/rocm/bin/amd-smi", self.run)


def read(amd: Amd, *, processes: bool) -> list[Reading]:
    return amd.read(amd.devices(), processes=processes)


# --- what is read --------------------------------------------------------------------------------------------------
def test_it_is_one_of_the_accelerators() -> None:
    amd: Accelerators = Host().open()
    assert (amd.vendor, amd.visible_variable) == ("amd", "HIP_VISIBLE_DEVICES")
    amd.close()


def test_versions_are_those_of_driver_rocm_and_tool() -> None:
    assert Host().open().versions == {"driver": "6.16.6", "rocm": "7.0.2", "amd-smi": "26.2.0+021c61fc"}


def test_a_newer_tool_calls_the_drivers_version_otherwise() -> None:
    versions = [{"version": "27.0.0", "rocm_version": "N/A", "driver_kernel_version": "6.8", "driver_version": "6.16.6"}]
    assert parse_versions(json.dumps(versions)) == {"driver": "6.16.6", "amd-smi": "27.0.0"}


def test_devices_have_memory_links_clock_and_power_limit() -> None:
    assert Host().open().devices() == (FIRST, SECOND)


def test_rocm_7_tells_the_power_limit_of_each_kind() -> None:
    expected = tuple(replace(gpu, power_limit_w=700.0) for gpu in (FIRST, SECOND))
    assert Host(static=text("static_rocm7")).open().devices() == expected


def test_numbers_may_come_without_units() -> None:
    static, metric = load("static"), load("metric")
    for row in static:
        row["vram"]["size"] = 196592
        row["limit"]["socket_power"] = 750
    assert tuple(parse_devices(text("list"), json.dumps(static), json.dumps(metric), text("topology"))) == (FIRST, SECOND)
    metric[0]["mem_usage"]["used_vram"] = 121344
    metric[0]["usage"]["gfx_activity"] = 97
    assert parse_metric(json.dumps(metric))[0][0] == BUSY


def test_indices_are_hips_where_hip_counts_otherwise_than_amd_smi() -> None:
    listed = load("list")
    listed[0]["hip_id"], listed[1]["hip_id"] = 1, 0
    amd = Host(**{"list -e": json.dumps(listed)}).open()
    assert amd.devices() == (replace(SECOND, index=0, peers=(1,)), replace(FIRST, index=1, peers=(0,)))
    assert read(amd, processes=False) == [IDLE, BUSY]


@pytest.mark.parametrize("hip_id", ["N/A", 0])
def test_indices_are_amd_smis_where_hips_are_not_told_of_all(hip_id: object) -> None:
    listed = load("list")
    listed[1]["hip_id"] = hip_id
    assert Host(**{"list -e": json.dumps(listed)}).open().devices() == (FIRST, SECOND)


def test_an_old_tool_lists_without_hips_numbers() -> None:
    listed = [{name: row[name] for name in ("gpu", "bdf", "uuid")} for row in load("list")]
    assert Host(**{"list -e": "fails", "list": json.dumps(listed)}).open().devices() == (FIRST, SECOND)


def test_only_direct_xgmi_links_make_peers() -> None:
    assert [(gpu.peers, gpu.links) for gpu in Host(topology=text("topology_pcie")).open().devices()] == [((), 0)] * 2
    far = load("topology")
    far[0]["links"][1]["num_hops"] = 2
    assert [gpu.peers for gpu in Host(topology=json.dumps(far)).open().devices()] == [(), (0,)]


def test_a_guest_system_has_no_topology_command() -> None:
    assert [gpu.peers for gpu in Host(topology="fails").open().devices()] == [(), ()]


def test_a_gpu_without_a_uuid_is_named_by_its_bus_address() -> None:
    listed = load("list")
    listed[0]["uuid"] = "N/A"
    assert [gpu.uuid for gpu in Host(**{"list -e": json.dumps(listed)}).open().devices()] == ["0000:05:00.0", SECOND.uuid]


def test_partitions_that_share_a_uuid_are_named_by_their_addresses() -> None:
    listed = load("list")
    listed[1] |= {"uuid": FIRST.uuid, "bdf": "0000:05:00.1"}
    assert [gpu.uuid for gpu in Host(**{"list -e": json.dumps(listed)}).open().devices()] == ["0000:05:00.0", "0000:05:00.1"]


def test_readings_of_a_busy_and_an_idle_gpu() -> None:
    assert read(Host().open(), processes=False) == [BUSY, IDLE]


def test_a_reading_is_of_the_gpus_asked_for_in_their_order() -> None:
    readings = Host().open().read([SECOND, FIRST], processes=False)
    assert [reading.sm_clock_mhz for reading in readings] == [132.0, 2100.0]


def test_a_process_that_cannot_be_looked_into_has_an_id_only() -> None:
    processes = [reading.processes for reading in read(Host().open(), processes=True)]
    assert processes == [{4242: 126877696000, 5150: None}, {}]


def test_processes_are_not_told_where_the_command_fails() -> None:
    assert [reading.processes for reading in read(Host(process="fails").open(), processes=True)] == [None, None]


def test_totals_are_energy_and_uncorrected_errors() -> None:
    amd = Host().open()
    assert amd.totals(amd.devices()) == [Totals(9876543.21, 0), Totals(1234567.89, 0)]


def test_a_radeon_tells_neither_highest_clock_nor_energy_nor_limits() -> None:
    metrics = parse_metric(text("metric_radeon"))
    first = Reading(
        used_bytes=20450 * 2**20,
        sm_clock_mhz=2774.0,
        utilization=0.91,
        temperature_c=63.0,
    )
    second = Reading(
        used_bytes=57 * 2**20,
        sm_clock_mhz=15.0,
        utilization=0.01,
        temperature_c=32.0,
    )
    assert metrics == {0: (first, Totals(None, 0)), 1: (second, Totals(None, 0))}
    devices = Host(metric=text("metric_radeon")).open().devices()
    assert [gpu.sm_clock_mhz for gpu in devices] == [None, None]


def test_a_warning_in_front_of_the_document_is_passed_over() -> None:
    warned = "WARNING: User is missing the following required groups: render, video. Please add user.\n" + text("metric")
    assert parse_metric(warned) == parse_metric(text("metric"))


def test_a_single_gpu_may_come_without_a_list() -> None:
    assert parse_metric(json.dumps(load("metric")[0]))[0][0] == BUSY


# --- what is wrong -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "printed", ["", "No devices found", "[", "3", '"N/A"', '{"cpu_data": []}', "[3]", "[[]]", '[{"gpu": "0"}]']
)
def test_a_document_that_is_not_a_list_of_gpus_is_an_error(printed: str) -> None:
    for parse in (parse_metric, parse_processes, lambda it: parse_devices(it, "[]", "[]", None)):
        with pytest.raises(AmdSmiError, match="should print"):
            parse(printed)


def test_the_error_says_what_was_found() -> None:
    with pytest.raises(AmdSmiError) as caught:
        parse_metric("AMDSMI not initialized")
    assert str(caught.value) == "`amd-smi` should print JSON; found 'AMDSMI not initialized'."


def test_a_version_that_is_not_an_object_is_an_error() -> None:
    with pytest.raises(AmdSmiError, match=r"should print a list of one object; found \[\]"):
        parse_versions("[]")


def test_a_unit_that_is_not_documented_is_an_error() -> None:
    metric = load("metric")
    metric[0]["energy"]["total_energy_consumption"]["unit"] = "kJ"
    with pytest.raises(AmdSmiError, match=r"tells `energy.total_energy_consumption` in 'kJ'"):
        parse_metric(json.dumps(metric))


def test_a_process_without_an_id_is_an_error() -> None:
    with pytest.raises(AmdSmiError, match="should name a process of GPU 0 by its id"):
        parse_processes('[{"gpu": 0, "process_list": [{"process_info": "something new"}]}]')


def test_a_gpu_that_does_not_tell_its_memory_is_an_error() -> None:
    with pytest.raises(AmdSmiError, match="doesn't tell the memory size of GPU 0"):
        parse_devices('[{"gpu": 0, "uuid": "x"}]', "[]", '[{"gpu": 0}]', None)


def test_a_gpu_that_is_no_longer_told_of_is_an_error() -> None:
    host = Host()
    amd = host.open()
    gpus = amd.devices()
    host.documents["metric"] = json.dumps(load("metric")[:1])
    with pytest.raises(AmdSmiError, match=f"tells nothing of GPU 1 \\({SECOND.uuid}\\)"):
        amd.read(gpus, processes=False)


def test_a_command_that_fails_is_an_error_with_its_last_words() -> None:
    assert run_command([sys.executable, "-c", "print('[]')"]) == "[]\n"
    with pytest.raises(CommandFailedError, match="ended with code 3: no driver"):
        run_command([sys.executable, "-c", "import sys; print('no driver', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(CommandFailedError, match="could not be run"):
        run_command(["/nowhere/amd-smi"])


# --- where it runs -------------------------------------------------------------------------------------------------
def test_without_the_tool_there_are_no_gpus() -> None:
    assert find(lambda name, path: None) is None


@pytest.mark.parametrize("listed", ["[]", "fails"])
def test_a_tool_that_lists_nothing_means_no_gpus(listed: str) -> None:
    assert find(lambda name, path: f"/opt/rocm/bin/{name}", Host(list=listed).run) is None


def test_a_tool_that_lists_gpus_is_used() -> None:
    amd = find(lambda name, path: f"/opt/rocm/bin/{name}", Host().run)
    assert amd is not None
    assert amd.devices() == (FIRST, SECOND)


# --- what is not told ----------------------------------------------------------------------------------------------
def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every object and list in a document with every key in it."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in [(document, key), *places(document[key])]]


@st.composite
def with_gaps(draw: st.DrawFn, name: str) -> str:
    """Return a document in which some things are absent or not told."""
    document = load(name)
    for _ in range(draw(st.integers(1, 4))):
        where, key = draw(st.sampled_from(places(document)))
        put = draw(st.sampled_from(MISSING))
        if put != "absent":
            where[key] = put
        elif isinstance(where, dict):
            del where[key]
        if not places(document):
            break
    return json.dumps(document)


def assert_no_new_zero(new_value: object, before: object) -> None:
    """What was something is something or None: a gap never reads as 0."""
    new, old = asdict(new_value), asdict(before)  # type: ignore[call-overload]
    assert {name for name, value in new.items() if value == 0} <= {name for name, value in old.items() if value == 0}


@given(with_gaps("metric"))
@settings(max_examples=150, deadline=None)
def test_what_a_metric_does_not_tell_is_never_0(document: str) -> None:
    before = parse_metric(text("metric"))
    try:
        metrics = parse_metric(document)
    except AmdSmiError:
        return
    for number, (reading, totals) in metrics.items():
        assert_no_new_zero(reading, before[number][0])
        assert_no_new_zero(totals, before[number][1])


@given(with_gaps("process"))
@settings(max_examples=100, deadline=None)
def test_what_a_process_does_not_tell_is_never_0(document: str) -> None:
    try:
        users = parse_processes(document)
    except AmdSmiError:
        return
    assert all(size is None or size > 0 for sizes in users.values() for size in sizes.values())


@given(with_gaps("list"), with_gaps("static"), with_gaps("metric"), with_gaps("topology"))
@settings(max_examples=150, deadline=None)
def test_what_a_device_does_not_tell_is_never_0(listed: str, static: str, metric: str, topology: str) -> None:
    try:
        devices = parse_devices(listed, static, metric, topology)
    except AmdSmiError:
        return
    for gpu in devices:
        assert gpu.memory_bytes > 0
        assert gpu.uuid
        assert gpu.sm_clock_mhz != 0
        assert gpu.power_limit_w != 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda it: st.lists(it) | st.dictionaries(st.text(), it),
    )
)
@settings(max_examples=100, deadline=None)
def test_no_document_raises_anything_but_the_documented_error(document: object) -> None:
    printed = json.dumps(document)
    for parse in (parse_metric, parse_processes, lambda it: parse_devices(it, it, it, it), parse_versions):
        with contextlib.suppress(AmdSmiError):
            parse(printed)
