"""A cache of things that are made as background work, between steps, and kept under a budget.

Merged copies of the base and linear combinations of adapters are its two uses. An item belongs to a key, is
made in slices when it is first asked for, and stays while anybody holds it or nobody needs its memory: the
least recently used item that nobody holds makes room for a new one. While one is being made nothing else
changes, and when that fails, or nobody wants it any more, it is gone as if it had never been.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from typing import Generic, TypeVar

from polygraft.engine.residency.background import BackgroundWork, Job
from polygraft.errors import PolygraftError, ResourceExhausted


class Resident:
    """One item, or what is on its way to be one.

    Args:
        key: what it belongs to.
        size: bytes, estimated until it is there.
    """

    def __init__(self, key: Hashable, size: int) -> None:
        self.key = key
        self.bytes = size
        self.users = 0
        """Holders, such as sequences that run on it or wait for it."""
        self.pinned = False
        """It is kept although nobody holds it."""
        self.ready = False
        self.reserved = False
        """Whether its bytes count against the budget."""
        self.forgotten = False
        """What it was made of is gone."""
        self.error: PolygraftError | None = None
        """Why it can't be made."""
        self.seconds = 0.0
        """From being asked for to being there."""

    @property
    def wanted(self) -> bool:
        """Whether it is pinned or in use."""
        return not self.forgotten and (self.users > 0 or self.pinned)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it: it isn't evicted inside this scope."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1


Item = TypeVar("Item", bound=Resident)


class Outcome(Enum):
    """What can become of an item."""

    MADE = auto()
    FAILED = auto()
    CANCELLED = auto()
    EVICTED = auto()


class ResidentCache(ABC, Generic[Item]):
    """The items of one kind. A subclass makes them.

    Args:
        budget: bytes that all of them together may take.
        flag: the setting of the budget, for errors.
        most: how many there may be, however small they are; None for no limit.
        clock: seconds.
    """

    def __init__(
        self,
        background: BackgroundWork,
        *,
        budget: int,
        flag: str,
        most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self._background = background
        self._flag = flag
        self._most = most
        self._clock = clock
        self._items: dict[Hashable, Item] = {}
        """The least recently used first."""

    @abstractmethod
    def _fill(self, item: Item) -> Generator[None, None, None]:
        """Make an item and set its bytes; yields where it may be interrupted, and given up."""

    @abstractmethod
    def _empty(self, item: Item) -> None:
        """Free what has been made of an item; no step that uses it is running."""

    @abstractmethod
    def _failure(self, item: Item, error: Exception) -> PolygraftError:
        """Log that an item can't be made, and return the error for those who wait for it."""

    @abstractmethod
    def _note(self, item: Item, outcome: Outcome) -> None:
        """Log and tell what has become of an item."""

    def _get(self, key: Hashable, new: Callable[[], Item]) -> Item:
        """Return the item of a key. Its making starts if it isn't there, or has failed before.

        Args:
            new: returns an item that is still to be made.
        """
        item = self._items.pop(key, None)
        if item is None or item.error is not None:
            item = new()
            self._background.add(self._make(item))
        self._items[key] = item
        return item

    def holds(self, item: Item) -> bool:
        """Whether it is its key's item still, neither evicted nor given up."""
        return self._items.get(item.key) is item

    def _forget(self, item: Item) -> None:
        """Drop an item whose origin is gone; no step that uses it may be running."""
        assert item.users == 0
        item.forgotten = True  # its making ends before it reads anything more
        self._drop(item)

    @property
    def count(self) -> int:
        """Items that are there."""
        return sum(item.ready for item in self._items.values())

    @property
    def bytes(self) -> int:
        """What they take, those that are being made included."""
        return sum(item.bytes for item in self._items.values() if item.reserved)

    def _make(self, item: Item) -> Job:
        started = self._clock()
        yield None
        try:
            if not (yield from self._reserve(item)):
                self._drop(item, Outcome.CANCELLED)
                return
            making = self._fill(item)
            for _ in making:
                yield None
                if not item.wanted:
                    making.close()
                    self._drop(item, Outcome.CANCELLED)
                    return
        except Exception as error:  # noqa: BLE001  # whatever it was, memory above all, the engine goes on
            self._empty(item)
            item.reserved = item.pinned = False
            item.error = self._failure(item, error)
            self._note(item, Outcome.FAILED)
            return
        item.ready = True
        item.seconds = self._clock() - started
        self._note(item, Outcome.MADE)

    def _reserve(self, item: Item) -> Generator[bool | None, None, bool]:
        """Wait until the budget has room; False if nobody wants the item any more.

        Raises:
            ResourceExhausted: what is pinned leaves no room.
        """
        while item.wanted:
            for other in list(self._items.values()):
                if self._has_room(item):
                    break
                if other.ready and not other.wanted:
                    self._drop(other, Outcome.EVICTED)
            if self._has_room(item):
                item.reserved = True
                return True
            pinned = sum(other.bytes for other in self._items.values() if other.pinned and other is not item)
            if pinned + item.bytes > self.budget:
                raise ResourceExhausted(
                    f"pinned copies take {pinned} bytes, this one takes {item.bytes}, {self._flag} allows "
                    f"{self.budget}"
                )
            yield True
        return False

    def _has_room(self, item: Item) -> bool:
        reserved = sum(other.reserved for other in self._items.values())
        return (self._most is None or reserved < self._most) and self.bytes + item.bytes <= self.budget

    def _drop(self, item: Item, outcome: Outcome | None = None) -> None:
        if self.holds(item):
            del self._items[item.key]
        self._empty(item)
        item.ready = False
        if outcome is not None:
            self._note(item, outcome)

    def check_integrity(self, users: Mapping[Hashable, int]) -> None:
        """Raise AssertionError unless each item has as many users as `users` counts by its key."""
        for key, item in self._items.items():
            assert item.users == users.get(key, 0), f"{key}: wrong users"
        assert self.bytes <= self.budget
