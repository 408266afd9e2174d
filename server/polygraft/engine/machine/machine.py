"""What this process may use of the machine: the lower of what the machine has and what its cgroups allow.

A container sees the whole machine's figures, while the kernel kills a process beyond the container's memory
limit and pauses one beyond its CPU quota. Limits nest: a group's limit holds for all groups below it, so the
lowest of a group's and its ancestors' limits counts.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MACHINE = "the machine"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes.

    Args:
        limit: most that may be in use.
        free: the part that isn't in use. Page cache that hasn't been used for a while counts as free, since
            the kernel reclaims it first.
        source: what sets the limit, for people.
    """

    limit: int
    free: int
    source: str


@dataclass(frozen=True, slots=True)
class Cores:
    """Processor cores.

    Args:
        allowed: how many this process may run on.
        quota: CPU seconds per second, or None if that isn't limited.
    """

    allowed: int
    quota: float | None

    @property
    def count(self) -> int:
        """Threads that can compute all the time: 2 with a quota of 2.5, since a third would stall them."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


class Machine:
    """Reads the limits from the kernel at each call.

    Args:
        root: where /proc and /sys are. Reads cgroups v1 and v2, also when both are mounted.
        allowed: returns how many cores this process may run on; by default the kernel's answer, which
            respects cpusets.
    """

    def __init__(self, root: Path = Path("/"), allowed: Callable[[], int] | None = None) -> None:
        self._root = root
        self._allowed = allowed or _allowed_cores

    def memory(self) -> Memory:
        """The host's memory within the cgroups' limits."""
        total, available = self._host_memory()
        least = Memory(total, available, MACHINE)
        for group in self._groups("memory"):
            for limit, used in _memory_of(group):
                if limit >= total:
                    continue  # v1 writes "no limit" as a huge number
                free = max(0, min(limit - used, least.free))
                if limit < least.limit:
                    least = Memory(limit, free, f"cgroup {group}")
                else:
                    least = Memory(least.limit, free, least.source)
        return least

    def cores(self) -> Cores:
        """The cores that this process may run on, and its CPU quota."""
        quotas = [quota for group in self._groups("cpu") if (quota := _quota_of(group)) is not None]
        return Cores(self._allowed(), min(quotas, default=None))

    def _host_memory(self) -> tuple[int, int]:
        """Total and available bytes."""
        found = _table(self._root / "proc/meminfo")
        if "MemTotal:" in found and "MemAvailable:" in found:
            return found["MemTotal:"] * 1024, found["MemAvailable:"] * 1024
        host = psutil.virtual_memory()
        return int(host.total), int(host.available)

    def _groups(self, controller: str) -> Iterator[Path]:
        """Folders of the groups whose limits apply: this process's own and their ancestors."""
        mounts = list(self._mounts())
        for line in _lines(self._root / "proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            names = controllers.split(",") if controllers else None  # cgroup v2's line names no controllers
            if names is not None and controller not in names:
                continue
            for mount in mounts:
                if mount.has(None if names is None else controller):
                    yield from mount.up_from(path)

    def _mounts(self) -> Iterator[_Mount]:
        for line in _lines(self._root / "proc/self/mountinfo"):
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.split(" ", 2)
            if kind not in ("cgroup", "cgroup2"):
                continue
            inside, at = (_unescaped(field) for field in fields.split(" ")[3:5])
            controllers = None if kind == "cgroup2" else tuple(options.split(","))
            yield _Mount(inside, self._root / at.lstrip("/"), controllers)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy of groups.

    Args:
        inside: the group at its root; in a container often the container's own, which hides the ancestors.
        at: the mount point.
        controllers: of cgroup v1; None for v2.
    """

    inside: str
    at: Path
    controllers: tuple[str, ...] | None

    def has(self, controller: str | None) -> bool:
        """Whether this is the hierarchy of a v1 controller, or for None that of v2."""
        if controller is None:
            return self.controllers is None
        return self.controllers is not None and controller in self.controllers

    def up_from(self, path: str) -> Iterator[Path]:
        """Folders from a group up to the root."""
        inside = self.inside.rstrip("/")
        below = path[len(inside) :] if path == inside or path.startswith(f"{inside}/") else ""
        group = self.at / below.lstrip("/")
        # The group isn't visible here, such as one outside the container's namespace.
        if ".." in group.parts or not group.is_dir():
            group = self.at
        while True:
            yield group
            if group == self.at:
                return
            group = group.parent


def _memory_of(group: Path) -> Iterator[tuple[int, int]]:
    """A group's limits, each with what is in use under it."""
    statistics = _table(group / "memory.stat")
    # cgroup v2. Beyond `high` the kernel doesn't kill the group, but makes it uselessly slow.
    used = _number(group / "memory.current")
    if used is not None:
        used = max(0, used - statistics.get("inactive_file", 0))
        for name in ("memory.max", "memory.high"):
            if (limit := _number(group / name)) is not None:
                yield limit, used
    # cgroup v1, whose statistics include limits of ancestors that aren't visible.
    used = _number(group / "memory.usage_in_bytes")
    if used is not None:
        used = max(0, used - statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        limits = (_number(group / "memory.limit_in_bytes"), statistics.get("hierarchical_memory_limit"))
        for limit in limits:
            if limit is not None:
                yield limit, used


def _quota_of(group: Path) -> float | None:
    """A group's CPU quota in cores, or None."""
    for line in _lines(group / "cpu.max"):  # cgroup v2
        quota, _, period = line.partition(" ")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return None if quota_us is None or quota_us <= 0 or not period_us else quota_us / period_us


def _allowed_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none or it is "max"."""
    with contextlib.suppress(ValueError):
        for line in _lines(path):
            return int(line)
    return None


def _table(path: Path) -> dict[str, int]:
    """The numbers in a file with a name and a number per line, by name."""
    found = {}
    for line in _lines(path):
        name, number, *_ = [*line.split(), "", ""]
        if number.isdigit():
            found[name] = int(number)
    return found


def _unescaped(field: str) -> str:
    """Undo mountinfo's escaping of spaces and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
