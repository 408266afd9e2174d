"""The base that adapters are checked against, and intact adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polygraft.base.loader import inspect_without_weights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder


@pytest.fixture(scope="session")
def specs(tiny_model: Callable[[str], Path]) -> Callable[[str], BaseSpec]:
    """A tiny model's spec by architecture."""
    made: dict[str, BaseSpec] = {}

    def get(architecture: str) -> BaseSpec:
        if architecture not in made:
            made[architecture] = inspect_without_weights(str(tiny_model(architecture)))
        return made[architecture]

    return get


@pytest.fixture
def spec(specs: Callable[[str], BaseSpec]) -> BaseSpec:
    """The commonest architecture's."""
    return specs("llama")


@pytest.fixture
def specimen(adapter_store: Callable[[str], Path]) -> Callable[[str], Specimen]:
    """A fresh copy of an intact adapter by kind."""
    return lambda kind: Specimen.load(adapter_store("llama") / kind)


CheckRefused = Callable[[str, dict[str, Any], str], None]
"""Takes a kind, what is changed in its configuration, and a part of the problem that it must make."""


@pytest.fixture
def check_refused(specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path) -> CheckRefused:
    """Fails unless an adapter with a changed configuration is refused, for the reason that is expected."""

    def check(kind: str, options: dict[str, Any], expected: str) -> None:
        damaged = specimen(kind)
        damaged.config.update(options)
        with pytest.raises(AdapterInvalid) as caught:
            compile_folder(damaged.save(tmp_path / "a"), spec)
        assert any(expected in problem for problem in caught.value.problems), caught.value.problems

    return check


CheckIgnored = Callable[[str, dict[str, Any]], None]
"""Takes a kind, and an option that PEFT drops when it loads it."""


@pytest.fixture
def check_ignored(specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path) -> CheckIgnored:
    """Fails unless an adapter with an option more is loaded with a warning that names it."""

    def check(kind: str, options: dict[str, Any]) -> None:
        changed = specimen(kind)
        changed.config.update(options)
        warnings = compile_folder(changed.save(tmp_path / "a"), spec).warnings
        for key in options:
            assert any(
                warning.startswith(f"{key}=") and "is ignored: PEFT knows no such option" in warning
                for warning in warnings
            )

    return check
