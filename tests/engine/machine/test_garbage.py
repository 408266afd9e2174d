"""What is loaded for good isn't looked at again, and what goes still goes."""

from __future__ import annotations

import gc
import platform
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.load_engine import load_engine
from polygraft.engine.machine.garbage import keep_for_good
from tests.engine.stores import copy_of, start_unload
from tests.engines import greedy, run_greedy


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
    gc.unfreeze()
    gc.collect()


@pytest.fixture
def engine(llama: Path, llama_store: Path, tmp_path: Path) -> Engine:
    store = copy_of(llama_store, tmp_path / "store", "lora", "prefix", "prompt")
    return load_engine(ServerConfig(model=str(llama), adapters=store, kv_cache_bytes=2**20))


class Node:
    """Something that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_a_loaded_engine_is_out_of_the_collectors_sight(engine: Engine) -> None:
    seen = {id(x) for x in gc.get_objects()}
    mine = [engine, engine.base.model, *engine.base.model.modules(), *engine.adapters.registry.list()]
    assert not seen & {id(x) for x in mine}
    assert gc.get_freeze_count() > 100_000


def test_an_adapter_from_the_start_leaves_no_tensors_when_it_is_unloaded(engine: Engine) -> None:
    # Nobody would find a cycle of such objects any more.
    gc.disable()
    run_greedy(engine, [greedy(name, [1, 2, 3], name, 3) for name in ("lora", "prefix", "prompt")])
    for name in ("lora", "prefix", "prompt"):
        done = start_unload(engine, name)
        engine.finish_background()
        engine.step()
        assert done.done()
    assert not engine.adapters.registry.list()
    del done
    gc.unfreeze()
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    assert not [x for x in gc.garbage if isinstance(x, torch.Tensor)]


def test_what_was_let_go_of_since_the_last_time_is_found() -> None:
    node = Node()
    keep_for_good()
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert gone() is not None
    keep_for_good()
    assert gone() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less")
def test_memory_that_was_freed_goes_back_to_the_system() -> None:
    # Small enough to lie in the heap, with one behind them that keeps its end where it is.
    blocks = [torch.ones(2**12) for _ in range(2**13)]
    last = torch.ones(2**12)
    del blocks
    process = psutil.Process()
    before = process.memory_info().rss
    keep_for_good()
    assert before - process.memory_info().rss > 2**26
    assert last.all()
