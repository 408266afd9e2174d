"""The wheel and the source distribution, built once, and site-packages with a part of the packages alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CLONE = Path(__file__).resolve().parents[2]
NOT_OF_THE_CLONE = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "out",
    "shared",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.so",
    "node_modules",
)


def project() -> dict[str, Any]:
    return tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def requirements(*extras: str) -> list[Requirement]:
    """What the plain install and these extras need, other extras of ours resolved."""
    found = [*map(Requirement, project()["dependencies"])]
    for extra in extras:
        for text in project()["optional-dependencies"][extra]:
            requirement = Requirement(text)
            found += requirements(*requirement.extras) if requirement.name == "polygraft" else [requirement]
    return [*{requirement.name: requirement for requirement in found}.values()]


@dataclass(frozen=True, slots=True)
class Built:
    """Both distributions; `site` is the wheel as it lies in site-packages, `source` the unpacked source."""

    wheel: zipfile.ZipFile
    site: Path
    source: Path

    def metadata(self) -> str:
        (name,) = [name for name in self.wheel.namelist() if name.endswith("dist-info/METADATA")]
        return self.wheel.read(name).decode()


def build(what: str, source: Path, into: Path) -> Path:
    """Run the build backend as pip does, without an environment of its own to download."""
    into.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(into)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel is built from the source distribution, which is built from a copy of the clone."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(CLONE, folder / "clone", ignore=shutil.ignore_patterns(*NOT_OF_THE_CLONE))
    with tarfile.open(build("sdist", folder / "clone", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    wheel = zipfile.ZipFile(build("wheel", source, folder / "wheel"))
    wheel.extractall(folder / "site")
    return Built(wheel, folder / "site", source)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def installed(built: Built, tmp_path: Path) -> Callable[..., Run]:
    """Run Python in an empty folder where only the wheel and what some extras bring is installed."""

    def install(*extras: str) -> Run:
        site = tmp_path / "-".join(("site", *extras))
        shutil.copytree(built.site, site)
        for distribution in _closure(requirements(*extras)):
            for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                target = site / part
                if not target.exists():
                    target.symlink_to(Path(str(distribution.locate_file(part))))
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            # -S leaves this environment's own site-packages out.
            return subprocess.run(
                [sys.executable, "-S", *arguments],
                cwd=empty, env={**kept, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip

        return run

    return install


def _closure(wanted: list[Requirement]) -> list[importlib.metadata.Distribution]:
    """The installed distributions that these need, and all that those need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = [*wanted]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        found[name] = importlib.metadata.distribution(name)
        left += [Requirement(text) for text in found[name].requires or ()]
    return [*found.values()]


def links(markdown: str) -> list[str]:
    """Targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", markdown) + re.findall(
        r"^\[[^\]]+\]:\s*(\S+)", markdown, re.MULTILINE
    )
