"""The adapters that requests can name: generations, pins and states.

Names are resolved on the event loop's thread while the engine's thread loads and unloads, so everything
here is guarded by one lock; nothing here touches a tensor.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, replace

from polygraft.core.adapter_weights import AdapterWeights
from polygraft.errors import AdapterNotFound, AdapterUnavailable, ResourceExhausted
from polygraft.near_names import did_you_mean
from polygraft.printable import printable_texts
from polygraft_types.adapters import AdapterInfo, AdapterState, MergedInfo
from polygraft_types.requests import AdapterRef


class Adapter:
    """One generation of an adapter: it never changes, and lives as long as anything pins it.

    Args:
        slot: in the low-rank bank; 0 for one without low-rank primitives.
    """

    def __init__(
        self, name: str, generation: int, compiled: AdapterWeights, slot: int, lock: threading.Lock
    ) -> None:
        self.name = name
        self.generation = generation
        self.compiled = compiled
        self.slot = slot
        self.pins = 0
        self._lock = lock

    def pin(self) -> None:
        """One more sequence holds it."""
        with self._lock:
            self.pins += 1

    def release(self) -> None:
        """One sequence less."""
        with self._lock:
            self.pins -= 1
            assert self.pins >= 0


@dataclass(slots=True)
class _Record:
    """What stands under a name. `adapter` is None until its first load has succeeded; `loading` is set while
    a load or a reload is on its way."""

    info: AdapterInfo
    adapter: Adapter | None = None
    loading: bool = True

    def check_settled(self) -> None:
        """Raise AdapterUnavailable while it is loading, reloading or unloading."""
        if self.loading or self.info.state == AdapterState.UNLOADING:
            raise AdapterUnavailable(self.info.name, "loading" if self.loading else "unloading")

    def serving(self) -> Adapter:
        """The generation that new requests get. Raises AdapterUnavailable, which says why there is none."""
        if self.info.state == AdapterState.UNLOADING:
            raise AdapterUnavailable(self.info.name, "being unloaded")
        if self.adapter is None:
            why = f"failed: {self.info.problems[0]}" if self.info.problems else "still loading; try again"
            raise AdapterUnavailable(self.info.name, why)
        return self.adapter


class AdapterRegistry:
    """All adapters by name, those that failed to load included.

    Args:
        max_adapters: most that may be ready or loading.
    """

    def __init__(self, max_adapters: int) -> None:
        self._max = max_adapters
        self._lock = threading.Lock()
        self._records: dict[str, _Record] = {}
        self._retired: list[Adapter] = []  # replaced or unloaded, still pinned
        self._generations = itertools.count(1)

    def resolve(self, ref: AdapterRef) -> Adapter:
        """The adapter that a request names, pinned.

        Raises:
            AdapterNotFound: no such name, or no such generation any more.
            AdapterUnavailable: it is loading, unloading, or failed to load.
        """
        with self._lock:
            record = self._records.get(ref.name)
            if record is None:
                raise self._unknown(ref.name)
            adapter = record.adapter
            if ref.generation is not None and (adapter is None or adapter.generation != ref.generation):
                adapter = next(
                    (a for a in self._retired if a.name == ref.name and a.generation == ref.generation), None
                )
                if adapter is None:
                    raise AdapterNotFound(ref.name, f"generation {ref.generation} isn't loaded (any more)")
            else:
                adapter = record.serving()
            adapter.pins += 1
            return adapter

    def begin_load(self, name: str, source: str) -> None:
        """Register a name as loading; a ready adapter goes on serving until its successor is.

        Raises:
            ResourceExhausted: there are as many adapters as are allowed.
            AdapterUnavailable: it is loading or unloading already.
        """
        with self._lock:
            record = self._records.get(name)
            if record is not None:
                record.check_settled()
                if record.adapter is not None:
                    record.loading = True
                    return
            taken = sum(r.info.state != AdapterState.FAILED for r in self._records.values())
            if taken >= self._max:
                raise ResourceExhausted(
                    f"{taken} adapters are loaded, the limit is {self._max} (--max-adapters)"
                )
            self._records[name] = _Record(AdapterInfo(name, AdapterState.LOADING, source))

    def new_adapter(self, name: str, compiled: AdapterWeights, slot: int) -> Adapter:
        """A new generation, not yet under its name."""
        return Adapter(name, next(self._generations), compiled, slot, self._lock)

    def finish_load(self, adapter: Adapter, info: AdapterInfo) -> AdapterInfo:
        """Let a name mean a new generation."""
        with self._lock:
            record = self._records[adapter.name]
            if record.adapter is not None:
                self._retired.append(record.adapter)
            record.adapter = adapter
            record.info = info
            record.loading = False
            return info

    def fail_load(self, name: str, source: str, problems: tuple[str, ...], *, keep: bool) -> AdapterInfo:
        """Note why a load failed; a generation that was ready before goes on serving.

        Args:
            keep: whether a name without a ready generation stays listed, as failed.
        """
        with self._lock:
            record = self._records[name]
            record.loading = False
            failed = AdapterInfo(name, AdapterState.FAILED, source, problems=problems)
            if record.adapter is None:
                record.info = failed
                if not keep:
                    del self._records[name]
            return failed

    @property
    def loading(self) -> bool:
        """Whether any load is on its way."""
        with self._lock:
            return any(record.loading for record in self._records.values())

    def pass_over(self, name: str, source: str, why: str) -> AdapterInfo:
        """List a folder that isn't loaded at all, with the reason; whoever asks for it learns it."""
        with self._lock:
            assert name not in self._records
            info = AdapterInfo(name, AdapterState.FAILED, source, problems=printable_texts([why]))
            self._records[name] = _Record(info, loading=False)
            return info

    def begin_unload(self, name: str, *, wait: bool) -> AdapterInfo:
        """Take no new requests for a name; a failed one is gone at once.

        Raises:
            AdapterNotFound: no such name.
            AdapterUnavailable: loading or unloading already, or in use and `wait` is False.
        """
        with self._lock:
            record = self._records.get(name)
            if record is None:
                raise self._unknown(name)
            record.check_settled()
            if record.adapter is None:
                del self._records[name]
                return record.info
            if record.adapter.pins and not wait:
                raise AdapterUnavailable(name, f"in use by {record.adapter.pins} running requests")
            record.info = replace(record.info, state=AdapterState.UNLOADING)
            return self._snapshot(record)

    def collect(self) -> list[tuple[Adapter, AdapterInfo | None]]:
        """The adapters that nothing holds any more, for the engine to free; each is returned once, with
        its last info if its name is gone with it."""
        with self._lock:
            gone: list[tuple[Adapter, AdapterInfo | None]] = [(a, None) for a in self._retired if a.pins == 0]
            self._retired = [adapter for adapter in self._retired if adapter.pins]
            for name, record in list(self._records.items()):
                if (
                    record.info.state == AdapterState.UNLOADING
                    and record.adapter
                    and record.adapter.pins == 0
                ):
                    # Its merged copy goes with it.
                    gone.append((record.adapter, replace(record.info, merged=None)))
                    del self._records[name]
            return gone

    def set_merged(self, adapter: Adapter, merged: MergedInfo | None) -> AdapterInfo | None:
        """Note where an adapter's merged copy stands; None if its name means another generation now."""
        with self._lock:
            record = self._records.get(adapter.name)
            if record is None or record.adapter is not adapter:
                return None
            record.info = replace(record.info, merged=merged)
            return self._snapshot(record)

    def get(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound."""
        info = self.find(name)
        if info is None:
            raise self._unknown(name)
        return info

    def _unknown(self, name: str) -> AdapterNotFound:
        """Nothing is registered under a name; names the nearest, and how to list all."""
        known = list(self._records)
        if not known:
            return AdapterNotFound(name, "not registered; no adapters are loaded")
        near = did_you_mean(name, known) or ";"
        count = f"all {len(known)}" if len(known) > 1 else "the only one"
        return AdapterNotFound(
            name, f"not registered{near} ListAdapters (`polygraft adapters list`) shows {count}"
        )

    def find(self, name: str) -> AdapterInfo | None:
        """None if nothing is registered under the name."""
        with self._lock:
            record = self._records.get(name)
            return None if record is None else self._snapshot(record)

    def current(self, name: str) -> Adapter:
        """The generation that a name means now, not pinned. Raises AdapterNotFound, AdapterUnavailable."""
        with self._lock:
            record = self._records.get(name)
            if record is None:
                raise self._unknown(name)
            return record.serving()

    def compiled(self, name: str) -> AdapterWeights:
        """What an adapter is made of. Raises AdapterNotFound, AdapterUnavailable."""
        return self.current(name).compiled

    def list(self) -> list[AdapterInfo]:
        """All of them by name."""
        with self._lock:
            return [self._snapshot(record) for _, record in sorted(self._records.items())]

    @staticmethod
    def _snapshot(record: _Record) -> AdapterInfo:
        return replace(record.info, running_requests=record.adapter.pins if record.adapter else 0)


def ready_info(
    adapter: Adapter, source: str, *, modules: int, disk_bytes: int, content_hash: str, load_seconds: float,
    warnings: tuple[str, ...], own_prompts: bool = False, merged: MergedInfo | None = None,
) -> AdapterInfo:  # fmt: skip
    """What the registry tells of an adapter that has just become ready."""
    compiled = adapter.compiled
    return AdapterInfo(
        name=adapter.name,
        state=AdapterState.READY,
        source=source,
        generation=adapter.generation,
        kind=compiled.kind,
        primitives=compiled.primitives,
        modules=modules,
        rank=compiled.rank,
        virtual_tokens=compiled.virtual_tokens,
        parameters=compiled.parameters,
        disk_bytes=disk_bytes,
        compiled_bytes=compiled.compiled_bytes,
        content_hash=content_hash,
        load_time=time.time(),
        load_seconds=load_seconds,
        warnings=warnings,
        mergeable=compiled.mergeable,
        merged_only=compiled.merged_only,
        merged=merged,
        own_prompts=own_prompts,
    )
