"""One engine for many tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polygraft.engine.engine import Engine
from tests.engine.asking import check_clean
from tests.engines import make_engine


@pytest.fixture(scope="module")
def shared(tiny_model: Callable[[str], Path], common_store: Callable[[str], Path]) -> Callable[[], Engine]:
    """One engine with every adapter, or a new one if a test left it dirty."""
    made: list[Engine] = []

    def get() -> Engine:
        if not made or made[0].has_work:
            made[:] = [make_engine(tiny_model("llama"), common_store("llama"))]
        return made[0]

    return get


@pytest.fixture
def engine(shared: Callable[[], Engine]) -> Iterator[Engine]:
    """The same for most tests, idle and whole before and after each."""
    engine = shared()
    yield engine
    check_clean(engine)
