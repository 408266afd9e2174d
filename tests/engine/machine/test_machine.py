"""Limits of cgroups, v1 and v2, as the kernel shows them to a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.engine.machine.machine import MACHINE, Cores, Machine, Memory

GIB = 2**30
MEMINFO = "MemTotal:       {total} kB\nMemFree:        1 kB\nMemAvailable:   {free} kB\n"
NONE_V1 = 9223372036854771712


class Fake:
    """A tree of /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put("proc/meminfo", MEMINFO.format(total=16 * GIB // 1024, free=12 * GIB // 1024))
        self.mounts: list[str] = []
        self.groups: list[str] = []

    def put(self, path: str, content: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{content}\n")

    def mount(self, kind: str, at: str, inside: str = "/", options: str = "rw") -> None:
        self.mounts.append(f"31 23 0:28 {inside} {at} rw,nosuid - {kind} {kind} {options}")
        self.put("proc/self/mountinfo", "\n".join(["22 1 0:1 / / rw - ext4 /dev/vda rw", *self.mounts]))

    def member(self, line: str) -> None:
        self.groups.append(line)
        self.put("proc/self/cgroup", "\n".join(self.groups))

    def v2(self, path: str, limit: object, used: int = 0, cached: int = 0) -> None:
        folder = f"sys/fs/cgroup{path}".rstrip("/")
        self.put(f"{folder}/memory.max", limit)
        self.put(f"{folder}/memory.current", used)
        self.put(f"{folder}/memory.stat", f"anon 1\ninactive_file {cached}\nactive_file 5")

    def v1(self, path: str, limit: int, used: int = 0, cached: int = 0, above: int = NONE_V1) -> None:
        folder = f"sys/fs/cgroup/memory{path}".rstrip("/")
        self.put(f"{folder}/memory.limit_in_bytes", limit)
        self.put(f"{folder}/memory.usage_in_bytes", used)
        statistics = f"inactive_file 7\nhierarchical_memory_limit {above}\ntotal_inactive_file {cached}"
        self.put(f"{folder}/memory.stat", statistics)

    @property
    def memory(self) -> Memory:
        return Machine(self.root).memory()

    def cores(self, allowed: int = 8) -> Cores:
        return Machine(self.root, lambda: allowed).cores()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


@pytest.fixture
def unified(fake: Fake) -> Fake:
    """A machine with cgroup v2 alone."""
    fake.mount("cgroup2", "/sys/fs/cgroup")
    return fake


@pytest.fixture
def divided(fake: Fake) -> Fake:
    """A machine with cgroup v1, and v2 without controllers beside it."""
    fake.mount("cgroup", "/sys/fs/cgroup/memory", options="rw,memory")
    fake.mount("cgroup", "/sys/fs/cgroup/cpu,cpuacct", options="rw,cpu,cpuacct")
    fake.mount("cgroup2", "/sys/fs/cgroup/unified")
    return fake


def test_a_machine_without_groups(fake: Fake) -> None:
    assert fake.memory == Memory(16 * GIB, 12 * GIB, MACHINE)
    assert fake.cores() == Cores(8, None)


def test_this_machine() -> None:
    memory, cores = Machine().memory(), Machine().cores()
    assert 0 < memory.free < memory.limit
    assert 1 <= cores.count <= cores.allowed


def test_v2(unified: Fake) -> None:
    unified.member("0::/service")
    unified.v2("/service", GIB, used=GIB // 2, cached=GIB // 8)
    group = unified.root / "sys/fs/cgroup/service"
    assert unified.memory == Memory(GIB, GIB // 2 + GIB // 8, f"cgroup {group}")


def test_v2_without_a_limit(unified: Fake) -> None:
    unified.member("0::/service")
    unified.v2("/service", "max", used=GIB)
    assert unified.memory == Memory(16 * GIB, 12 * GIB, MACHINE)


def test_v2_slows_down_before_it_kills(unified: Fake) -> None:
    unified.member("0::/service")
    unified.v2("/service", 2 * GIB, used=GIB // 4)
    unified.put("sys/fs/cgroup/service/memory.high", GIB)
    assert (unified.memory.limit, unified.memory.free) == (GIB, GIB - GIB // 4)


def test_the_least_of_all_ancestors(unified: Fake) -> None:
    unified.member("0::/a/b/c")
    unified.v2("/a/b/c", 3 * GIB, used=GIB)
    unified.v2("/a/b", "max", used=GIB)
    unified.v2("/a", 2 * GIB, used=GIB + 5)  # neighbours use some of it
    assert (unified.memory.limit, unified.memory.free) == (2 * GIB, GIB - 5)
    # The least limit and the least that is free may be different groups'.
    unified.v2("/a", 4 * GIB, used=4 * GIB - 7)
    assert (unified.memory.limit, unified.memory.free) == (3 * GIB, 7)


def test_a_group_that_is_over_its_limit_has_nothing(unified: Fake) -> None:
    unified.member("0::/a")
    unified.v2("/a", GIB, used=GIB + 1)
    assert unified.memory.free == 0


def test_a_machine_with_less_than_the_limit_leaves(unified: Fake) -> None:
    unified.member("0::/a")
    unified.v2("/a", 14 * GIB, used=GIB)
    unified.put("proc/meminfo", MEMINFO.format(total=16 * GIB // 1024, free=GIB // 1024))
    assert (unified.memory.limit, unified.memory.free) == (14 * GIB, GIB)


@pytest.mark.parametrize(
    ("inside", "member"),
    [
        ("/", "0::/"),  # a namespace of its own
        ("/docker/x", "0::/docker/x"),  # none, but only its own group is mounted
        ("/docker/x", "0::/../../elsewhere"),
        ("/", "0::/gone"),
    ],
)
def test_containers_see_their_own_group_at_the_top(fake: Fake, inside: str, member: str) -> None:
    fake.mount("cgroup2", "/sys/fs/cgroup", inside)
    fake.member(member)
    fake.v2("/", GIB, used=5)
    fake.put("sys/fs/cgroup/cpu.max", "50000 100000")
    assert (fake.memory.limit, fake.memory.free) == (GIB, GIB - 5)
    assert fake.cores().quota == 0.5


def test_v1(divided: Fake) -> None:
    divided.member("4:memory:/docker/x")
    divided.member("2:cpu,cpuacct:/docker/x")
    divided.member("0::/")
    divided.v1("/docker/x", GIB, used=GIB // 2, cached=GIB // 8)
    divided.v1("/docker", NONE_V1, used=GIB)
    divided.v1("/", NONE_V1, used=4 * GIB)
    divided.put("sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", -1)
    divided.put("sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", 100000)
    assert (divided.memory.limit, divided.memory.free) == (GIB, GIB // 2 + GIB // 8)
    assert divided.cores() == Cores(8, None)
    divided.put("sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us", 250000)
    divided.put("sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us", 100000)
    assert divided.cores() == Cores(8, 2.5)


def test_v1_tells_of_ancestors_that_cant_be_seen(divided: Fake) -> None:
    divided.member("4:memory:/x")
    divided.v1("/x", NONE_V1, used=5, above=GIB)
    assert (divided.memory.limit, divided.memory.free) == (GIB, GIB - 5)


def test_paths_with_spaces(fake: Fake) -> None:
    fake.mount("cgroup2", "/sys/fs/my\\040groups")
    fake.member("0::/a b")
    fake.put("sys/fs/my groups/a b/memory.max", GIB)
    fake.put("sys/fs/my groups/a b/memory.current", 1)
    assert fake.memory.limit == GIB


@pytest.mark.parametrize(
    ("content", "allowed", "count"),
    [
        ("max 100000", 8, 8),
        ("200000 100000", 8, 2),
        ("250000 100000", 8, 2),
        ("50000 100000", 8, 1),
        ("800000 100000", 4, 4),
    ],
)
def test_cores(unified: Fake, content: str, allowed: int, count: int) -> None:
    unified.member("0::/a/b")
    unified.put("sys/fs/cgroup/a/cpu.max", content)
    unified.put("sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert unified.cores(allowed).count == count


def test_what_cant_be_understood_limits_nothing(unified: Fake) -> None:
    unified.member("0::/a")
    unified.put("sys/fs/cgroup/a/memory.max", "nonsense")
    unified.put("sys/fs/cgroup/a/memory.current", "")
    unified.put("sys/fs/cgroup/a/cpu.max", "1")
    assert unified.memory.source == MACHINE
    assert unified.cores().quota is None
