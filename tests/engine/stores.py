"""Small adapter stores to change while an engine runs."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from polygraft.engine.engine import Engine
from polygraft_types.adapters import AdapterInfo
from polygraft_types.requests import AdapterRef


def copy_of(store: Path, to: Path, *kinds: str) -> Path:
    """A store with some of another's adapters."""
    to.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        shutil.copytree(store / kind, to / kind)
    return to


def change(folder: Path, factor: float = 0.0, **config: object) -> None:
    """Scale an adapter's weights and set options of its configuration."""
    weights = folder / "adapter_model.safetensors"
    save_file({name: t * factor for name, t in load_file(weights).items()}, weights)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def strengthen(folder: Path) -> None:
    """Other weights that do something as visible."""
    change(folder, 3.0)


def start_load(
    engine: Engine, name: str, source: str | None = None, *, reload: bool = False
) -> Future[AdapterInfo]:
    """Load a folder of the engine's store; the outcome comes with the steps."""
    done: Future[AdapterInfo] = Future()
    folder = engine.adapters.store.read(name, source or name)
    engine.adapters.load(name, source or name, folder, done, reload=reload)
    return done


def load(engine: Engine, name: str, source: str | None = None, *, reload: bool = False) -> AdapterInfo:
    """Load a folder to its end."""
    done = start_load(engine, name, source, reload=reload)
    engine.finish_background()
    return done.result(0)


def start_unload(engine: Engine, name: str, *, wait: bool = True) -> Future[AdapterInfo]:
    """Unload an adapter; the outcome comes when nothing uses it."""
    done: Future[AdapterInfo] = Future()
    engine.adapters.unload(name, done, wait=wait)
    return done


def poison(engine: Engine, name: str) -> None:
    """Turn an adapter's weights, as the layers read them, into NaN."""
    adapter = engine.adapters.registry.resolve(AdapterRef(name))
    with torch.inference_mode():
        for slots in engine.adapters._bank.modules._slots.values():
            if adapter.slot in slots._weights:
                slots._weights[adapter.slot][0].fill_(torch.nan)
    adapter.release()
