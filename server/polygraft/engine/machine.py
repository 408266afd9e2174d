"""What this process may use of the machine: the least of what the machine has and what its cgroups allow.

In a container the machine's own figures are all the machine's, while the kernel kills whoever goes over the
container's limit of memory, and stops for a while whoever goes over its limit of processor time. Limits
nest: a group's holds for all groups below it, so the least of a group and its ancestors counts.
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
        free: of these, what isn't. Page cache that nobody has used for a while counts as free, since the
            kernel takes it back first.
        source: what sets the limit, for people.
    """

    limit: int
    free: int
    source: str


@dataclass(frozen=True, slots=True)
class Cores:
    """Processor cores.

    Args:
        allowed: this process may run on so many.
        quota: so many seconds of processor time in a second, if that is limited.
    """

    allowed: int
    quota: float | None

    @property
    def count(self) -> int:
        """Threads that can compute all the time: of a quota of 2.5 two, since a third would stop them all."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


class Machine:
    """Asks the kernel anew each time.

    Args:
        root: where /proc and /sys are; cgroups v1 and v2 are read, one beside the other too.
        allowed: cores that this process may run on; a cpuset's are among what the kernel answers.
    """

    def __init__(self, root: Path = Path("/"), allowed: Callable[[], int] | None = None) -> None:
        self._root = root
        self._allowed = allowed or _allowed_cores

    def memory(self) -> Memory:
        """Memory of the host, as far as the cgroups leave it."""
        total, available = self._host_memory()
        least = Memory(total, available, MACHINE)
        for group in self._groups("memory"):
            for limit, used in _memory_of(group):
                if limit >= total:
                    continue  # so large that it is none
                free = max(0, min(limit - used, least.free))
                if limit < least.limit:
                    least = Memory(limit, free, f"cgroup {group}")
                else:
                    least = Memory(least.limit, free, least.source)
        return least

    def cores(self) -> Cores:
        """Cores that this process may run on, and the processor time that it gets."""
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
        """Folders of the groups whose limits hold: this process's own, and their ancestors'."""
        mounts = list(self._mounts())
        for line in _lines(self._root / "proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            names = controllers.split(",") if controllers else None  # cgroup v2's line names none
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
    """A hierarchy of groups.

    Args:
        inside: the group that is mounted: of a container often its own, and then the ancestors aren't seen.
        at: where.
        controllers: of cgroup v1; None is v2's.
    """

    inside: str
    at: Path
    controllers: tuple[str, ...] | None

    def has(self, controller: str | None) -> bool:
        """Whether it is the hierarchy of a controller of v1, or for None that of v2."""
        if controller is None:
            return self.controllers is None
        return self.controllers is not None and controller in self.controllers

    def up_from(self, path: str) -> Iterator[Path]:
        """Folders from a group to the topmost."""
        inside = self.inside.rstrip("/")
        below = path[len(inside) :] if path == inside or path.startswith(f"{inside}/") else ""
        group = self.at / below.lstrip("/")
        # A group that can't be seen from here, such as one outside of the container's namespace.
        if ".." in group.parts or not group.is_dir():
            group = self.at
        while True:
            yield group
            if group == self.at:
                return
            group = group.parent


def _memory_of(group: Path) -> Iterator[tuple[int, int]]:
    """Limits of a group, each with what is in use under it."""
    statistics = _table(group / "memory.stat")
    # cgroup v2. Beyond `high` the group isn't killed but made so slow that it might as well be.
    used = _number(group / "memory.current")
    if used is not None:
        used = max(0, used - statistics.get("inactive_file", 0))
        for name in ("memory.max", "memory.high"):
            if (limit := _number(group / name)) is not None:
                yield limit, used
    # cgroup v1; its statistics also tell of ancestors that can't be seen.
    used = _number(group / "memory.usage_in_bytes")
    if used is not None:
        used = max(0, used - statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        limits = (_number(group / "memory.limit_in_bytes"), statistics.get("hierarchical_memory_limit"))
        for limit in limits:
            if limit is not None:
                yield limit, used


def _quota_of(group: Path) -> float | None:
    """Cores' worth of processor time that a group gets, if that is limited."""
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
    """None where there is none, or where it is "max"."""
    with contextlib.suppress(ValueError):
        for line in _lines(path):
            return int(line)
    return None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    found = {}
    for line in _lines(path):
        name, number, *_ = [*line.split(), "", ""]
        if number.isdigit():
            found[name] = int(number)
    return found


def _unescaped(field: str) -> str:
    """A path as mountinfo writes it, with spaces and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
