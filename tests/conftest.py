"""Tiny models and adapter stores, made once for the whole run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.peft_folders import COMMON, KINDS, save_adapter
from tests.tiny import save_tiny_model

# Two threads that wait for each other at every operator on tiny tensors are many times slower than one as
# soon as anything else runs on the machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by architecture."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def adapter_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Folder with one adapter of every kind, for a tiny model by architecture."""

    @functools.cache
    def get(architecture: str) -> Path:
        store: Path = tmp_path_factory.mktemp(f"{architecture}-store")
        for seed, kind in enumerate(KINDS):
            save_adapter(store / kind, tiny_model(architecture), architecture, kind, seed)
        return store

    return get


@pytest.fixture(scope="session")
def common_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> Callable[[str], Path]:
    """The same with the kinds of `COMMON` alone, which an engine loads in a part of the time."""

    @functools.cache
    def get(architecture: str) -> Path:
        store: Path = tmp_path_factory.mktemp(f"{architecture}-common")
        for seed, kind in enumerate(KINDS):
            if kind in COMMON:
                save_adapter(store / kind, tiny_model(architecture), architecture, kind, seed)
        return store

    return get


@pytest.fixture
def llama(tiny_model: Callable[[str], Path]) -> Path:
    """A tiny model of the commonest architecture."""
    return tiny_model("llama")


@pytest.fixture
def llama_store(common_store: Callable[[str], Path]) -> Path:
    """One adapter of each common kind for it."""
    return common_store("llama")
