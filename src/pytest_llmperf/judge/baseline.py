"""Baselines: one small sorted JSON file per case under `<folder>/<host>/`, with raw rounds and where they came from.

The key is the host's kind, the case's id, and the engine's kind where it is not the test's own. Engine arguments, environment
and versions are recorded and shown when a verdict is red, but are no part of the key: a changed setting is judged against what is
stored. What was sent, and to which model and kind of engine, is different: nothing else is comparable.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

import msgspec

from pytest_llmperf.files import is_file, read_file, rewrite
from pytest_llmperf.judge.places import is_place_of, may_be_used, named_tests
from pytest_llmperf.judge.places import path_for as path_for  # a baseline's own
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.measure import metrics
from pytest_llmperf.measure.measurement import Launch
from pytest_llmperf.plan.capacity import CAPACITIES, CAPACITY
from pytest_llmperf.plan.files import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


VERSION = 3
"""Format of the files. History: 1, the first; 2, the job of each launch, and the noise; 3, what is lacking, and a checksum."""
_READABLE = (1, 2, 3)
_CHECKED = 3  # the first format with a checksum
REMEDY = "restore it from version control, or delete it and record anew with --update-baselines"
_DECISIVE = ("version", "formulas", "host", "workload", "workload_fingerprint", "lacking", "launches")
"""The fields that decide a verdict, hence are in the checksum; of the provenance that is what `_DECISIVE_FACTS` names. A case's
id, the noise, versions and environment are for people: a test may be renamed in them, and what is private taken out."""
_DECISIVE_FACTS = ("kind", "model", "model_config", "served_model")
_UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What a damaged file raises. Before msgspec 0.21 its errors are no ValueErrors."""
MOST_LAUNCHES = 40
"""More launches than this bring nothing (their mean is known far better than the run's); the oldest go."""

_ELSEWHERE = "name another folder with --llmperf-baselines"


class BaselineError(ValueError):
    """A baseline file cannot be used. The message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class Baseline:
    """The stored launches of the accepted version of a case on one kind of host."""

    case_id: str
    host: str
    workload: dict[str, Any]
    workload_fingerprint: str
    provenance: Provenance
    launches: tuple[Launch, ...]
    formulas: int = metrics.FORMULAS
    noise: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """What --llmperf-calibrate found per metric: parts of the noise, detectable slow-down, proposed tolerance. For people."""
    lacking: dict[str, str] | None = None
    """The gating metrics that it can never be compared by, each with the reason; None where an older file does not say."""
    version: int = field(default=VERSION, compare=False)
    """The format that its file had; it is stored in the newest."""
    doubts: tuple[str, ...] = ()
    """Why nothing may be judged by it, though it can be read: it was edited by hand, or is another host's. Never stored."""

    @property
    def jobs(self) -> int:
        """Return in how many runs of pytest its launches were measured."""
        return len({launch.job for launch in self.launches})


def extended(stored: Baseline, new: Baseline) -> Baseline:
    """Return the new launches behind the stored ones, the newest `MOST_LAUNCHES` of them; provenance is the new one's.

    What a calibration found of the noise stays: it is of the same version.
    """
    return replace(new, launches=(*stored.launches, *new.launches)[-MOST_LAUNCHES:], noise=stored.noise)


class _EngineFacts(TypedDict, total=False):
    """What a baseline says of its engine, as far as a verdict or its messages ask for it."""

    kind: str
    model: str | None
    served_model: str
    model_config: str
    args: str
    env: dict[str, str]
    command: str


def load(path: Path, host: str | None = None) -> Baseline | None:
    """Return the stored baseline, None where the file does not exist; raises BaselineError for an unusable file.

    One that was edited by hand, or was recorded on another `host` than this, is returned with its doubts.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise BaselineError(
            f"{path}: cannot be read (a file stands in the place of a folder); move it, or {_ELSEWHERE}"
        ) from error
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    try:
        stored = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        version = msgspec.json.decode(stored["version"])
        if version not in _READABLE or isinstance(version, bool):
            raise BaselineError(f"{path}: format version {shown(version)}, this plugin reads up to {VERSION}; {REMEDY}")
        baseline = _decoded(stored)
        edited = version >= _CHECKED or "checksum" in stored
        doubts = [_EDITED] if edited and checksum(text) != msgspec.json.decode(stored.get("checksum", b"null")) else []
    except BaselineError:
        raise
    except _UNUSABLE as error:
        what = str(error).partition("\n")[0][:200]
        raise BaselineError(f"{path}: not a baseline ({type(error).__name__}: {what}); {REMEDY}") from error
    if host is not None and baseline.host != host:
        doubts.append(f"the baseline is another host's: recorded on {shown(baseline.host)}, and not on {host!r}")
    return replace(baseline, doubts=tuple(doubts))


_EDITED = "the baseline was edited by hand, or mixed of two by a merge: its checksum does not fit what it holds"


@cache
def _types() -> dict[str, Any]:
    return {name: of for name, of in get_type_hints(Baseline).items() if name != "doubts"}


def _decoded(stored: dict[str, Any]) -> Baseline:
    """Return the baseline of a file's fields, each as its own bytes; raises one of `_UNUSABLE`."""
    stored |= {"case_id": stored["case"], "formulas": stored["formulas"]}  # the latter must not be taken from the class
    # Each field from its own bytes: one of msgspec's plain values could be a number that it converts wrongly.
    baseline = Baseline(**{name: msgspec.json.decode(stored[name], type=of) for name, of in _types().items() if name in stored})
    Provenance(**msgspec.json.decode(stored["provenance"]))  # which refuses a field that it does not know
    msgspec.convert(baseline.provenance.engine, _EngineFacts)
    if not baseline.launches or not all(launch.rounds for launch in baseline.launches):
        raise ValueError("no launches, or one without rounds")
    if CAPACITY in baseline.workload and baseline.workload[CAPACITY]["varied"] not in CAPACITIES:
        raise ValueError(f"unknown search for {shown(baseline.workload[CAPACITY]['varied'])}")
    return baseline


def checksum(text: str | bytes) -> str:
    """Return 16 hex digits of what decides a verdict; the same when a formatter has moved keys, or written 1 for 1.0.

    It tells of edits and accidents, such as a merge conflict that was resolved by hand; it keeps nobody from forging one.
    """
    data = json.loads(text, parse_int=float)
    engine = data["provenance"]["engine"]
    decisive = {name: data.get(name) for name in _DECISIVE} | {name: engine.get(name) for name in _DECISIVE_FACTS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def without_checksum(stored: Baseline) -> list[str]:
    """Return that a baseline's file is of a format that has no checksum; empty where it is of a newer one."""
    return [f"{_OLDER} {stored.version}, which has no checksum: record it anew"] if stored.version < _CHECKED else []


def is_of_older(note: str) -> bool:
    """Return whether a note says so."""
    return note.startswith(_OLDER)


_OLDER = "the baseline is of format"


def renamed(stored: Baseline, case_id: str) -> Baseline:
    """Return a baseline under another case's id."""
    return stored if stored.case_id == case_id else replace(stored, case_id=case_id)


def head(path: Path) -> dict[str, Any]:
    """Return the fields of a file that `dump` writes in front of its launches; empty where its beginning does not tell.

    They are as they stand there: neither their types nor the checksum were looked at.
    """
    try:
        begin, found, _ = read_file(path, _HEAD_BYTES).partition(_LAUNCHES)
        fields = json.loads(begin + b"}") if found else {}
    except (OSError, *_UNUSABLE):
        return {}
    return fields if isinstance(fields, dict) else {}


_HEAD_BYTES = 1 << 16
_LAUNCHES = b',\n  "launches": [\n'


def dump(baseline: Baseline) -> str:
    """Return the file's text: sorted keys, one line per round, so that a diff shows which numbers moved.

    Raises ValueError for a baseline with doubts, which a checksum that fits would hide.
    """
    if baseline.doubts:
        raise ValueError(f"{baseline.case_id}: a baseline with doubts is not stored again: {baseline.doubts[0]}")
    data = asdict(baseline)
    stored = ",\n".join(_dump_launch(launch) for launch in data.pop("launches"))
    data["case"] = data.pop("case_id")
    data["version"] = VERSION
    del data["doubts"]
    data["checksum"] = checksum(_text(data, stored))
    return _text(data, stored)


def _text(data: dict[str, Any], launches: str) -> str:
    lines = [f"  {json.dumps(key)}: {json.dumps(data[key], sort_keys=True, allow_nan=False)}" for key in sorted(data)]
    return "{\n" + ",\n".join(lines) + _LAUNCHES.decode() + launches + "\n  ]\n}\n"


def _dump_launch(launch: dict[str, Any]) -> str:
    for each in launch["rounds"]:
        del each["counters"]  # those that gate are metrics
    rounds = ",\n".join(f"      {json.dumps(each, sort_keys=True, allow_nan=False)}" for each in launch.pop("rounds"))
    # Only sound launches are stored, warnings were told, and how long it took is of no use later.
    del launch["invalid"], launch["warnings"], launch["played_s"], launch["samples"]
    for name in ("memory", "model"):
        if not launch[name]:
            del launch[name]
    rest = ", ".join(f"{json.dumps(key)}: {json.dumps(launch[key], sort_keys=True, allow_nan=False)}" for key in sorted(launch))
    return "    {" + rest + ', "rounds": [\n' + rounds + "\n    ]}"


def save(path: Path, baseline: Baseline) -> None:
    """Write the file as a whole or not at all; another case's file is never touched."""
    rewrite(path, lambda: dump(baseline), durable=True)


def amend(locate: Callable[[], Path], change: Callable[[Path], Baseline]) -> None:
    """Write the baseline that `change` makes of what is stored at a path, while no other process writes there.

    `locate` is asked again when nobody else writes: another case's file may lie there meanwhile. Raises OSError, or what
    `change` does.
    """

    def text() -> str:
        if locate() != path:
            raise _ElsewhereError
        return dump(change(path))

    while True:
        path = locate()
        try:
            return rewrite(path, text, durable=True)
        except _ElsewhereError:
            continue


class _ElsewhereError(Exception):
    """The file has its place somewhere else now."""


def unused(folder: Path, host: str, rootpath: Path, collected: Iterable[str]) -> list[Path]:
    """Return this host's baselines whose test is gone: no such file any more, or no such test in a file that was collected.

    `collected` are the ids of all cases of the run, deselected ones too. Parameters don't count: which of them a run
    collects depends on its options. A file that was moved with its renamed test is of the test that its place names.
    """
    tests = {case_id.partition("[")[0].partition("#")[0] for case_id in collected}
    files = {test.partition("::")[0] for test in tests}
    named, gone = named_tests(tests), []
    for path in _files_below(folder / host):
        case_id = _case_of(path)
        if case_id is None:
            continue  # whose it is cannot be told; its own test fails with this error
        test = case_id.partition("[")[0].partition("#")[0]
        file = test.partition("::")[0]
        if test in tests or (file not in files and is_file(rootpath / file)):
            continue
        place = path.relative_to(folder / host)
        if is_place_of(place, test) or not may_be_used(place, rootpath, named):
            gone.append(path)
    return gone


def _case_of(path: Path) -> str | None:
    """Return the id that a file says that it is of, None where it is unusable; only a file with an unusual head is read whole."""
    case_id = head(path).get("case")
    if isinstance(case_id, str):
        return case_id
    try:
        stored = load(path)
    except BaselineError:
        return None
    return stored.case_id if stored else None


def _files_below(folder: Path) -> list[Path]:
    walked = os.walk(folder)  # which passes over what cannot be listed
    return sorted(Path(parent, name) for parent, _, names in walked for name in names if name.endswith(".json"))
