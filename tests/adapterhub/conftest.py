"""AdapterHub's folders, to be damaged, and the bases that they are for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from polygraft.adapters.files.adapterhub_form import ADAPTERHUB_WEIGHTS
from polygraft.base.loader import inspect_without_weights
from polygraft.core.spec import BaseSpec
from tests.adapterhub.library import FIXTURES, base_folder
from tests.adapters.specimen import Specimen


@pytest.fixture(scope="session")
def bases() -> Callable[[str], BaseSpec]:
    """A tiny base's spec by architecture."""
    return functools.cache(lambda architecture: inspect_without_weights(str(base_folder(architecture))))


@pytest.fixture
def base(bases: Callable[[str], BaseSpec]) -> BaseSpec:
    return bases("llama")


@pytest.fixture
def specimen() -> Callable[..., Specimen]:
    """A fresh copy of an intact folder."""
    return lambda key, architecture="llama": Specimen.load(FIXTURES / architecture / key, ADAPTERHUB_WEIGHTS)
