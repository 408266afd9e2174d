"""What the engine tells those who watch it, other than outputs: one list, in the order of happening."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from polygraft_types.adapters import AdapterInfo, MergeEvent
from polygraft_types.requests import LoraPath


class AdapterChange(Enum):
    """What can become of an adapter; the observer's methods say more."""

    CHANGED = auto()
    REMOVED = auto()
    LOAD_FAILED = auto()


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """Something has become of an adapter."""

    change: AdapterChange
    info: AdapterInfo


@dataclass(frozen=True, slots=True)
class PathDecision:
    """AUTO has changed the path of an adapter's requests to this one."""

    path: LoraPath


Event = AdapterEvent | MergeEvent | PathDecision
Events = list[Event]
