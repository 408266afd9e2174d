"""What is declared to be needed: ranges, with both of their ends in the files of constraints."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .conftest import CLONE, project, requirements

TESTED = ("cli", "server", "train", "bench", "test")
"""The extras that `make test-oldest` installs."""


def constraints(name: str) -> dict[str, Version]:
    found = {}
    for line in (CLONE / name).read_text().splitlines():
        if line and not line.startswith("#"):
            project_name, version = line.split("==")
            found[canonicalize_name(project_name)] = Version(version)
    return found


def lower_end(requirement: Requirement) -> Version:
    (version,) = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return version


@pytest.mark.parametrize("extra", [None, *project()["optional-dependencies"]])
def test_no_extra_pins_a_version(extra: str | None) -> None:
    """An exact version keeps the whole package out of every environment that has another."""
    for requirement in requirements(*([extra] if extra else [])):
        assert {part.operator for part in requirement.specifier} <= {">=", "<"}, str(requirement)


def test_gpu_images_are_within_the_ranges() -> None:
    ends = {requirement.name: requirement for requirement in requirements("server")}
    for name, version in {"torch": "2.11.0", "transformers": "5.17.0", "tokenizers": "0.23.2"}.items():
        assert ends[name].specifier.contains(version)
    assert constraints("constraints-oldest.txt")["triton"] == Version("3.6.0")


def test_the_oldest_constraints_are_the_lower_ends() -> None:
    expected = {canonicalize_name(each.name): lower_end(each) for each in requirements(*TESTED)}
    found = constraints("constraints-oldest.txt")
    found.pop("triton")  # torch 2.11 names it itself
    assert found == expected


def test_the_constraints_are_within_the_ranges() -> None:
    tried = constraints("constraints.txt")
    for requirement in requirements(*project()["optional-dependencies"]):
        version = tried[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} isn't met by {version}"
