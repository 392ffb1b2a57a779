"""Fuzzing led by coverage: `python tests/chaos/fuzz.py TARGET [-runs=N] [flags of libFuzzer]`; needs atheris.

Each target begins with the real inputs of `fuzz_targets.py`. An input that breaks a promise is written to `crash-...` in the
current folder (`-artifact_prefix=FOLDER/` for another one), and `python tests/chaos/fuzz.py TARGET crash-...` tries it again.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_WORKS_IN = "--works-in="
_DEFAULTS = ("-max_len=16384", "-timeout=20", "-rss_limit_mb=2048")
"""An input that takes longer than 20 s is a hang."""


def main(arguments: list[str]) -> int:
    """Fuzz in a child, because libFuzzer ends its process at once and would leave its folder behind."""
    with tempfile.TemporaryDirectory(prefix="llmperf-fuzz-") as folder:
        command = [sys.executable, str(Path(__file__).absolute()), f"{_WORKS_IN}{folder}", *arguments]
        return subprocess.run(command, check=False).returncode


def fuzz(folder: Path, name: str, flags: list[str]) -> None:
    """Fuzz one target until the flags say that it is enough; never returns."""
    import atheris

    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["pytest_llmperf"], enable_loader_override=False):
        from tests.chaos.fuzz_targets import TARGETS
    from tests.chaos.mutations import mutated
    from tests.chaos.scratch import use_folder

    if name not in TARGETS:
        sys.exit(f"{name!r}: no such target; known are {', '.join(TARGETS)}")
    use_folder(folder)
    target = TARGETS[name]
    seeds = list(target.seeds())
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        return mutated(data, chance.choice(seeds), chance)[:most]

    inputs = [] if any(not flag.startswith("-") for flag in flags) else [str(corpus)]
    atheris.Setup([sys.argv[0], *_DEFAULTS, *flags, *inputs], target.check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if sys.argv[1].startswith(_WORKS_IN):
        fuzz(Path(sys.argv[1].removeprefix(_WORKS_IN)), sys.argv[2], sys.argv[3:])
    sys.exit(main(sys.argv[1:]))
