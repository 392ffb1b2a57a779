"""Baselines: one small sorted JSON file per case under `<folder>/<host>/`, with raw rounds and where they came from.

The key is the host's kind, the case's id, and the engine's kind where it is not the test's own. Engine arguments, environment
and versions are recorded and shown when a verdict is red, but are no part of the key: a changed setting is judged against what is
stored. What was sent, and to which model and kind of engine, is different: nothing else is comparable.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec

from pytest_llmperf.files import is_file, read_file, rewrite
from pytest_llmperf.judge.places import is_place_of, may_be_used
from pytest_llmperf.judge.places import path_for as path_for  # a baseline's own
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.measure import metrics
from pytest_llmperf.measure.measurement import Launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


VERSION = 2
"""Format of the files. History: 1, the first; 2, the job of each launch, and the noise."""
_READABLE = (1, 2)
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

    @property
    def jobs(self) -> int:
        """Return in how many runs of pytest its launches were measured."""
        return len({launch.job for launch in self.launches})


def extended(stored: Baseline, new: Baseline) -> Baseline:
    """Return the new launches behind the stored ones, the newest `MOST_LAUNCHES` of them; provenance is the new one's.

    What a calibration found of the noise stays: it is of the same version.
    """
    return replace(new, launches=(*stored.launches, *new.launches)[-MOST_LAUNCHES:], noise=stored.noise)


def load(path: Path) -> Baseline | None:
    """Return the stored baseline, None where the file does not exist; raises BaselineError for an unusable file."""
    remedy = "restore it from version control, or delete it and record anew with --update-baselines"
    try:
        text = read_file(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise BaselineError(
            f"{path}: cannot be read (a file stands in the place of a folder); move it, or {_ELSEWHERE}"
        ) from error
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    try:
        stored = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        version = msgspec.json.decode(stored["version"])
        if version not in _READABLE:
            raise BaselineError(f"{path}: format version {version!r}, this plugin reads up to {VERSION}; {remedy}")
        stored |= {"case_id": stored["case"], "formulas": stored["formulas"]}  # the latter must not be taken from the class
        # Each field from its own bytes: one of msgspec's plain values could be a number that it converts wrongly.
        types = get_type_hints(Baseline)
        baseline = Baseline(**{name: msgspec.json.decode(stored[name], type=types[name]) for name in types if name in stored})
        Provenance(**msgspec.json.decode(stored["provenance"]))  # which refuses a field that it does not know
        if not baseline.launches or not all(launch.rounds for launch in baseline.launches):
            raise ValueError("no launches, or one without rounds")
        return baseline
    except BaselineError:
        raise
    except _UNUSABLE as error:
        raise BaselineError(f"{path}: not a baseline ({type(error).__name__}: {error}); {remedy}") from error


def dump(baseline: Baseline) -> str:
    """Return the file's text: sorted keys, one line per round, so that a diff shows which numbers moved."""
    data = asdict(baseline)
    launches = data.pop("launches")
    data["case"] = data.pop("case_id")
    data["version"] = VERSION
    lines = [f"  {json.dumps(key)}: {json.dumps(data[key], sort_keys=True, allow_nan=False)}" for key in sorted(data)]
    stored = ",\n".join(_dump_launch(launch) for launch in launches)
    return "{\n" + ",\n".join(lines) + ',\n  "launches": [\n' + stored + "\n  ]\n}\n"


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
    gone = []
    for path in _files_below(folder / host):
        try:
            stored = load(path)
        except BaselineError:
            continue  # whose it is cannot be told; its own test fails with this error
        test = stored.case_id.partition("[")[0].partition("#")[0] if stored else ""
        file = test.partition("::")[0]
        if test in tests or (file not in files and is_file(rootpath / file)):
            continue
        place = path.relative_to(folder / host)
        if is_place_of(place, test) or not may_be_used(place, rootpath, tests):
            gone.append(path)
    return gone


def _files_below(folder: Path) -> list[Path]:
    walked = os.walk(folder)  # which passes over what cannot be listed
    return sorted(Path(parent, name) for parent, _, names in walked for name in names if name.endswith(".json"))
