"""Loads and unloads adapters while requests run; lives on the engine's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.files.store import AdapterStore
from polygraft.adapters.registry import Adapter, AdapterRegistry, ready_info
from polygraft.adapters.resolve.base_weights import resolve_against_base
from polygraft.adapters.resolve.token_rows import resolve_token_rows
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.names import NOT_A_NAME, is_name
from polygraft.core.spec import BaseSpec
from polygraft.engine.events import AdapterChange, AdapterEvent, Events
from polygraft.engine.loading.adapter_rules import SMOKE_TEST_TOKENS, AdapterRules
from polygraft.engine.loading.load_memory import LOADS_AT_ONCE, LoadMemory
from polygraft.engine.loading.smoke_tests import SmokeTests
from polygraft.engine.prompts.adapter_prompts import AdapterPrompts
from polygraft.engine.residency.background import BackgroundWork, Job
from polygraft.engine.residency.merged_copies import MergedCopies
from polygraft.engine.schedule.scheduler import Scheduler
from polygraft.errors import (
    AdapterError,
    AdapterExists,
    AdapterInvalid,
    InvalidRequest,
    PolygraftError,
)
from polygraft.layers.adapter_bank import AdapterBank
from polygraft.layers.linear.memory import give_back
from polygraft.printable import printable, printable_texts
from polygraft_types.adapters import AdapterInfo, AdapterState

log = logging.getLogger(__name__)

_LOGGED = 2000
"""Characters of a folder's problems in the log; the adapter's status has them all."""
_WORTH_GIVING_BACK = 2**25
"""Bytes of weights that have been loaded before what was freed goes back to the system."""


class AdapterManager:
    """Registry, low-rank bank and shared prefixes, kept in step.

    Args:
        events: what becomes of adapters is added to it.
        forget: called with every generation that is gone, before its weights are.
    """

    def __init__(
        self,
        base: BaseSpec,
        store: AdapterStore,
        registry: AdapterRegistry,
        bank: AdapterBank,
        scheduler: Scheduler,
        background: BackgroundWork,
        smoke_tests: SmokeTests,
        copies: MergedCopies,
        prompts: AdapterPrompts,
        rules: AdapterRules,
        memory: LoadMemory,
        events: Events,
        forget: Callable[[Adapter], None],
    ) -> None:
        self.registry = registry
        self.store = store
        self._base = base
        self._bank = bank
        self._scheduler = scheduler
        self._background = background
        self._rules = rules
        self.memory = memory
        self._on_the_way = 0
        self._loaded_bytes = 0  # since memory was given back
        self._smoke_tests = smoke_tests
        self._copies = copies
        self._prompts = prompts
        self._forget = forget
        self._loading: dict[str, tuple[str, Future[AdapterInfo]]] = {}  # content hash and outcome
        self._unloading: dict[str, Future[AdapterInfo]] = {}
        self._events = events

    def load_store(self) -> None:
        """Load every folder of the store, after a smoke test of the base alone, which warms it up as well.

        Broken folders and those that are passed over are listed with the reason. Runs as background work.

        Raises (from the background work): BaseModelError if the base's logits aren't finite.
        """
        self._background.add(self._try_base())
        if (only := self.store.only) is not None:
            log.info("--adapters names a single adapter's folder: it is served as %s", printable(only, 128))
        elif not self.store.names() and self.store.exists:
            log.warning(
                "--adapters names a folder without sub-folders: no adapter is loaded. It should hold a "
                "folder for each adapter, as PEFT or AdapterHub saves them"
            )
        names = self._names_in_store()
        for _ in range(LOADS_AT_ONCE):
            self._background.add(self._load_each(names))

    def _names_in_store(self) -> Iterator[str]:
        for name in self.store.names():
            if is_name(name):
                yield name
            else:
                self._pass_over(printable(name, 128), name, f"{NOT_A_NAME}; rename the folder")

    def _pass_over(self, name: str, source: str, why: str) -> None:
        """List what isn't loaded, with the reason."""
        log.warning("adapter %s is not loaded: %s", name, why)
        info = self.registry.pass_over(name, printable(source), why)
        self._events.append(AdapterEvent(AdapterChange.LOAD_FAILED, info))
        self._events.append(AdapterEvent(AdapterChange.CHANGED, info))

    def _load_each(self, names: Iterator[str]) -> Job:
        for name in names:
            yield from self._load_from_store(name)

    def _try_base(self) -> Job:
        yield from self._smoke_tests.try_base()

    def _load_from_store(self, name: str) -> Job:
        # At once, so that it is the last names that there is no room for.
        while (no_room := self._begin_load(name)) is not None:
            if not self.registry.loading:
                self._pass_over(name, name, str(no_room))
                return
            yield True  # one that is on its way may fail, and leave its place
        yield None
        ticket = None
        try:
            size = self.store.size(name, name)
            while (ticket := self.memory.take(size)) is None:
                yield True
            folder: AdapterFolder | PolygraftError = self.store.read(name, name, size)
        except (AdapterInvalid, InvalidRequest) as error:
            folder = error
        yield from self._load(name, name, folder, Future(), keep_failed=True)
        if ticket is not None:
            ticket.give_back()

    def _begin_load(self, name: str) -> PolygraftError | None:
        """Register a folder of the store as loading; why it can't be now."""
        try:
            self.registry.begin_load(name, name)
        except PolygraftError as error:
            return error
        return None

    def load(
        self, name: str, source: str, folder: AdapterFolder, done: Future[AdapterInfo], *, reload: bool
    ) -> None:
        """Start loading what has been read; `done` gets the outcome, which is that of a load of the same
        content that is on its way already.

        Args:
            reload: whether the name may be taken by other content, which is then replaced.
        """
        content, outcome = self._loading.get(name, ("", done))
        if content == folder.content_hash:
            outcome.add_done_callback(lambda first: _follow(first, done))
            return
        try:
            current = self.registry.find(name)
            if current is not None and current.state == AdapterState.READY:
                if current.content_hash == folder.content_hash:
                    done.set_result(current)
                    return
                if not reload:
                    raise AdapterExists(
                        name, f"loaded from {current.source!r} with other content; reload replaces it"
                    )
            self.registry.begin_load(name, source)
        except PolygraftError as error:
            done.set_exception(error)
            return
        keep_failed = current is not None
        self._loading[name] = folder.content_hash, done
        done.add_done_callback(lambda _: self._loading.pop(name))
        self._background.add(self._load(name, source, folder, done, keep_failed=keep_failed))

    def _load(
        self,
        name: str,
        source: str,
        folder: AdapterFolder | PolygraftError,
        done: Future[AdapterInfo],
        *,
        keep_failed: bool,
    ) -> Job:
        self._on_the_way += 1
        yield from self._load_one(name, source, folder, done, keep_failed=keep_failed)
        self._on_the_way -= 1
        self._loaded_bytes += 0 if isinstance(folder, PolygraftError) else folder.disk_bytes
        if self._on_the_way == 0 and self._loaded_bytes >= _WORTH_GIVING_BACK:
            # The C library would keep what files, tensors and compilers have used.
            self._loaded_bytes = 0
            yield None
            give_back()

    def _load_one(
        self,
        name: str,
        source: str,
        folder: AdapterFolder | PolygraftError,
        done: Future[AdapterInfo],
        *,
        keep_failed: bool,
    ) -> Job:
        started = time.monotonic()
        adapter: Adapter | None = None
        try:
            if isinstance(folder, PolygraftError):
                raise folder
            examined = yield from self._rules.examine(folder)
            prompts = examined.prompts
            compiled = yield from resolve_token_rows(name, examined.compiled, self._bank)
            compiled = yield from resolve_against_base(compiled, self._bank.modules)
            slot = self._bank.install(compiled) if compiled.in_bank else 0
            adapter = self.registry.new_adapter(name, compiled.without_layer_weights(), slot)
            if compiled.merged_only:
                self._rules.check_copy(name, compiled, self._copies.bytes_for(adapter))
            if prompts is not None:
                self._prompts.add(adapter, prompts)
            warnings = yield from self._smoke_tests.try_adapter(adapter, _own_tokens(compiled))
            info = ready_info(
                adapter,
                source,
                modules=examined.modules,
                disk_bytes=folder.disk_bytes,
                content_hash=folder.content_hash,
                load_seconds=time.monotonic() - started,
                warnings=(*examined.warnings, *warnings),
                own_prompts=prompts is not None and prompts.is_own,
                merged=self._copies.info(adapter),
            )
            self.registry.finish_load(adapter, info)
        except (GeneratorExit, SystemExit, KeyboardInterrupt):
            raise
        except BaseException as raised:  # noqa: BLE001  # a panic in a library included: the engine goes on
            if adapter is not None:
                self._free(adapter)
            done.set_exception(self._fail(name, source, raised, keep=keep_failed))
            return
        for warning in info.warnings:
            log.warning("adapter %s: %s", name, warning)
        log.info("adapter %s is loaded (%s, generation %d)", name, info.kind, info.generation)
        self._events.append(AdapterEvent(AdapterChange.CHANGED, info))
        done.set_result(info)

    def _fail(self, name: str, source: str, raised: BaseException, *, keep: bool) -> Exception:
        """Log and list why an adapter isn't loaded, and return the error for who asked for it."""
        panic = PolygraftError(f"{type(raised).__name__}: {raised}")
        error = raised if isinstance(raised, Exception) else panic
        problems = error.problems if isinstance(error, AdapterInvalid) else printable_texts([str(error)])
        failed = self.registry.fail_load(name, source, problems, keep=keep)
        if isinstance(error, PolygraftError):
            log.warning("adapter %s is not loaded: %s", name, printable(_why(error), _LOGGED))
        else:
            log.exception("adapter %s is not loaded", name)
        self._events.append(AdapterEvent(AdapterChange.LOAD_FAILED, failed))
        if keep:
            self._events.append(AdapterEvent(AdapterChange.CHANGED, self.registry.get(name)))
        return error

    def unload(self, name: str, done: Future[AdapterInfo], *, wait: bool) -> None:
        """Start unloading; `done` gets the outcome once nothing uses the adapter."""
        try:
            info = self.registry.begin_unload(name, wait=wait)
        except PolygraftError as error:
            done.set_exception(error)
            return
        if info.state == AdapterState.FAILED:
            self._events.append(AdapterEvent(AdapterChange.REMOVED, info))
            done.set_result(info)
            return
        self._events.append(AdapterEvent(AdapterChange.CHANGED, info))
        self._unloading[name] = done
        self.collect()

    def collect(self) -> None:
        """Free what nothing holds any more."""
        for adapter, info in self.registry.collect():
            self._free(adapter)
            if info is None:  # a new generation has its name
                continue
            log.info("adapter %s is unloaded", adapter.name)
            self._events.append(AdapterEvent(AdapterChange.REMOVED, info))
            self._unloading.pop(adapter.name).set_result(info)

    def _free(self, adapter: Adapter) -> None:
        self._forget(adapter)
        if adapter.slot:
            self._bank.remove(adapter.slot)
        self._scheduler.prefixes.forget(adapter)


def _why(error: PolygraftError) -> str:
    """An error's text without the adapter's name."""
    return error.problem if isinstance(error, AdapterError) else str(error)


def _own_tokens(compiled: AdapterWeights) -> list[int]:
    """Some tokens that an adapter has rows of its own for."""
    own = (rows.ids for rows in compiled.token_rows if rows.ids is not None)
    return [token for ids in own for token in ids[: SMOKE_TEST_TOKENS // 2].tolist()]


def _follow(first: Future[AdapterInfo], second: Future[AdapterInfo]) -> None:
    error = first.exception()
    if error is None:
        second.set_result(first.result())
    else:
        second.set_exception(error)
