"""The base that adapters are checked against, and intact adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polygraft.base.loader import inspect_without_weights
from polygraft.base.spec import BaseSpec
from tests.adapters.specimen import Specimen


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
