"""The options, each declared once, with its ini twin.

This much is needed in every pytest run; what the options mean is in `settings.py`, which is imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.kinds import KINDS

if TYPE_CHECKING:
    import pytest

# flag, default (None: none; False: a switch), help
OPTIONS: tuple[tuple[str, str | bool | None, str], ...] = (
    (
        "--llmperf-model",
        None,
        "model(s): a bundled one, a folder, or a name the engine resolves; default: tiny, bundled",
    ),
    (
        "--llmperf-tp",
        None,
        "tensor-parallel degree(s), by comma; selects the cases that run (default: 1 where unmarked)",
    ),
    ("--llmperf-pp", None, "pipeline-parallel degree(s), by comma (default: 1 where unmarked)"),
    ("--llmperf-dp", None, "data-parallel degree(s), by comma (default: 1 where unmarked)"),
    ("--llmperf-concurrency", None, "requests in flight, by comma (default: 8 where unmarked)"),
    (
        "--llmperf-rate",
        None,
        "requests sent per second, by comma, whatever the engine has answered (open loop); inf: all at once",
    ),
    (
        "--llmperf-engine",
        None,
        "server (vLLM's OpenAI server as a child), offline (vllm.LLM), url, command (any server), or simulated (no model)",
    ),
    (
        "--llmperf-url",
        None,
        "existing OpenAI-compatible endpoint(s): URL or name=URL, by comma; key in LLMPERF_API_KEY",
    ),
    (
        "--llmperf-header",
        None,
        "header of every request to an endpoint: NAME=VARIABLE of the environment, or 'NAME: text with $VARIABLE'; may be"
        " repeated (in the ini file: one a line)",
    ),
    (
        "--llmperf-command",
        None,
        "command line of an OpenAI-compatible server, e.g. 'llama-server -m {model} --port {port}'; {host}, {tp}, {pp}, {dp},"
        " {python}, {gpus} too, {{ for a brace",
    ),
    ("--llmperf-python", None, "interpreter that has vLLM (default: the one that runs pytest)"),
    ("--llmperf-engine-args", None, "engine arguments as on vLLM's command line, e.g. '--max-num-seqs 64'"),
    ("--llmperf-startup-timeout", "600", "seconds for an engine to give its first token"),
    ("--llmperf-stop-grace", "10", "seconds between SIGTERM and SIGKILL when an engine is stopped"),
    ("--llmperf-stall-timeout", "120", "seconds without any token after which a round counts as hung"),
    ("--llmperf-baselines", "baselines", "folder of the baselines, relative to the rootdir"),
    ("--llmperf-missing-baseline", "fail", "fail, skip, or record where no baseline is stored"),
    ("--update-baselines", False, "record the baselines of all selected cases anew"),
    ("--update-baselines-new-only", False, "record baselines only where none is stored; compare the others"),
    ("--llmperf-update", "extend", "extend a baseline of the same version by what is recorded, or replace it always"),
    ("--llmperf-calibrate", None, "record this many launches of what is stored, and propose tolerances from their noise"),
    ("--llmperf-selftest", False, "measure nothing: inject changes into the stored samples, and list gates that do not fire"),
    ("--llmperf-launches", "5", "engine starts that a recorded baseline consists of"),
    ("--llmperf-rounds", "5", "measured rounds per launch"),
    (
        "--llmperf-idle",
        None,
        "let the engine idle for so long after its rounds, e.g. 30m, and play them again: is it still warm?",
    ),
    ("--llmperf-max-launches", "8", "engine starts that an undecided case may use"),
    ("--llmperf-tolerance", "5 %", "slow-down that must not pass"),
    ("--llmperf-gate", None, "gating metrics: METRIC=TOLERANCE, =on or =off by comma, e.g. ttft_p90_s=8%,tpot_p50_s=off"),
    ("--llmperf-inconclusive", "warn", "warn or fail when the launches are used up without a decision"),
    (
        "--llmperf-require-gpus",
        False,
        "fail, not skip, where there are too few GPUs: a run that skips all is not green",
    ),
    (
        "--llmperf-require-comparisons",
        None,
        "fail a run in which fewer cases than =N are compared with a baseline (without =N: 1; 0: off): one that skips all, or"
        " records all, is not green",
    ),
    (
        "--llmperf-exclusive",
        "on",
        "on: no other run's engine on this host while one of ours is measured; off: only none on the same GPUs",
    ),
    ("--llmperf-json", None, "write every raw sample to this file"),
)
CHOICES: dict[str, tuple[str, ...]] = {
    "--llmperf-engine": tuple(KINDS),
    "--llmperf-missing-baseline": ("fail", "skip", "record"),
    "--llmperf-update": ("extend", "replace"),
    "--llmperf-inconclusive": ("warn", "fail"),
    "--llmperf-exclusive": ("on", "off"),
}
"""The values of the options that have only some; `settings.py` refuses others, so that ini files are checked too."""

MAY_HOLD_SECRETS = frozenset({"--llmperf-url", "--llmperf-header", "--llmperf-command", "--llmperf-engine-args"})
"""Options whose values are not shown where they cannot even be read."""

REPEATED = frozenset({"--llmperf-header"})
"""Options that may be given several times: their values may hold commas."""

OPTIONAL_VALUES: dict[str, str] = {"--llmperf-require-comparisons": "1"}
"""Options whose value may be left out, and what it is then; one that is given stands behind a `=`."""


def add_options(parser: pytest.Parser) -> None:
    """Declare every option and its ini twin."""
    group = parser.getgroup("llmperf", "LLM inference performance")
    for flag, default, text in OPTIONS:
        facts = [f"choices: {', '.join(CHOICES[flag])}"] if flag in CHOICES else []
        facts += [f"default: {default}"] if isinstance(default, str) else []
        shown = f" ({'; '.join(facts)})" if facts else ""
        action: dict[str, Any] = {"action": "store_true"} if default is False else {"metavar": _metavar(flag)}
        action |= {"action": "append"} if flag in REPEATED else {}
        action |= {"nargs": "?", "const": OPTIONAL_VALUES[flag]} if flag in OPTIONAL_VALUES else {}
        group.addoption(flag, dest=ini_name(flag), default=None, help=(text + shown).replace("%", "%%"), **action)
        if default is False:
            parser.addini(ini_name(flag), text, type="bool", default=default)
        else:
            parser.addini(ini_name(flag), text, type="string", default=default)


def fill_in_values(args: list[str]) -> bool:
    """Write the value behind each option that was given without; return whether there was one.

    argparse takes the next word for it, and that is a path: `--llmperf-require-comparisons tests/`.
    """
    end = args.index("--") if "--" in args else len(args)
    bare = [place for place, word in enumerate(args[:end]) if word in OPTIONAL_VALUES]
    for place in bare:
        args[place] += f"={OPTIONAL_VALUES[args[place]]}"
    return bool(bare)


def ini_name(flag: str) -> str:
    """Return the name of an option in the ini file and in pytest's namespace, e.g. `llmperf_tp`."""
    return flag.removeprefix("--").replace("-", "_")


def _metavar(flag: str) -> str:
    return flag.rpartition("-")[2].upper()


def any_given(config: pytest.Config) -> bool:
    """Return whether the command line has any of the options; they are checked even when no test uses them.

    So is what demands something of a run whose tests may not use us at all, wherever it stands.
    """
    given = any(config.getoption(ini_name(flag), None) is not None for flag, _, _ in OPTIONS)
    return given or any(config.getini(ini_name(flag)) for flag in OPTIONAL_VALUES)
