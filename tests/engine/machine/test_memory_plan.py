"""The memory plan: nothing is promised twice, and what settings ask for is held against what there is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.machine.machine import Cores, Machine, Memory
from polygraft.engine.machine.memory_plan import MemoryPlan, plan_memory, step_bytes
from polygraft.engine.machine.threads import set_threads
from polygraft.errors import ConfigError
from tests.engine.machine.test_machine import Fake

MIB, GIB = 2**20, 2**30


def plan(free: int, limit: int = GIB, own: int = 0, steps: int = 0, **asked: int) -> MemoryPlan:
    wanted: dict[str, int | None] = {"cache": None, "merged": None, "combined": None, **asked}
    return plan_memory(Memory(limit, free, "cgroup /x"), own, base=7, steps=steps, asked=wanted)


def test_the_example_of_a_container() -> None:
    # 1 GiB, of which the base and the interpreter have taken 600 MiB; the machine itself has 16 GiB.
    made = plan(424 * MIB, own=600 * MIB, steps=150 * MIB)
    assert made.spare == int(GIB * 0.05)
    left = 424 * MIB - 150 * MIB - made.spare
    assert (made.cache, made.merged, made.combined) == (int(left / 4), int(left / 5), int(left / 20))
    assert made.promised == 424 * MIB


@given(
    free=st.integers(2**20, 2**45),
    beside=st.integers(0, 2**45),
    own=st.integers(0, 2**45),
    steps=st.integers(0, 2**33),
    asked=st.dictionaries(st.sampled_from(["cache", "merged", "combined"]), st.integers(1, 2**44)),
)
def test_nothing_is_promised_twice(
    free: int, beside: int, own: int, steps: int, asked: dict[str, int]
) -> None:
    try:
        made = plan(free, free + beside, own, steps, **asked)
    except ConfigError:
        return
    for name, count in asked.items():
        assert getattr(made, name) == count
    assert min(made.cache, made.merged, made.combined, made.adapters, made.steps, made.spare) >= 0
    fits = steps + made.spare + sum(asked.values()) <= free
    if fits:
        assert made.promised == free
    else:
        # What settings ask for isn't made less, and nothing is added to it.
        assert made.promised - made.steps - made.spare == sum(asked.values())


def test_what_is_asked_for_leaves_the_less_to_share_out() -> None:
    made = plan(GIB, 2 * GIB, cache=GIB // 2)
    assert made.cache == GIB // 2
    assert made.merged < plan(GIB, 2 * GIB).merged


@pytest.mark.parametrize(("name", "flag"), [("cache", "--kv-cache-bytes"), ("merged", "--merged-bytes")])
def test_more_than_could_ever_be_had_is_refused(name: str, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(400 * MIB, own=600 * MIB, steps=100 * MIB, **{name: 425 * MIB})
    assert caught.value.flag == flag
    assert "425 MiB can't be had: of the 1.0 GiB of cgroup /x, 600 MiB are in use" in str(caught.value)
    assert "Ask for at most 273 MiB" in str(caught.value)


def test_all_that_is_asked_for_counts_together() -> None:
    with pytest.raises(
        ConfigError, match="--merged-bytes: 300 MiB and 200 MiB of other settings can't be had"
    ):
        plan(400 * MIB, own=600 * MIB, cache=200 * MIB, merged=300 * MIB)


def test_what_others_may_give_back_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    made = plan(100 * MIB, own=200 * MIB, cache=400 * MIB)
    assert (made.cache, made.merged, made.combined, made.adapters) == (400 * MIB, 0, 0, 0)
    assert "400 MiB asked for, but 100 MiB are free" in caplog.text


def test_nothing_left_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(100 * MIB, own=900 * MIB, steps=150 * MIB)
    assert caught.value.flag == "--kv-cache-bytes"
    assert "nothing is left for the KV cache: of the 1.0 GiB of cgroup /x, 100 MiB are free" in str(
        caught.value
    )
    assert "--max-num-batched-tokens" in str(caught.value)


def test_the_log_says_it_in_two_lines() -> None:
    first, second = plan(424 * MIB, own=600 * MIB, steps=150 * MIB).lines()
    assert first == "memory: limit 1.0 GiB (cgroup /x), free 424 MiB beside the base of 0 MiB"
    assert second == (
        "memory: KV cache 56 MiB, merged copies 45 MiB, combinations 11 MiB, adapters 111 MiB, steps 150 MiB, "
        "spare 51 MiB"
    )


def test_an_engine_keeps_to_its_containers_limit(llama: Path, tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.mount("cgroup2", "/sys/fs/cgroup")
    fake.member("0::/")
    fake.put("proc/meminfo", f"MemTotal: {2**27} kB\nMemAvailable: {2**27} kB\n")
    base = load_base(str(llama))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polygraft.engine.machine.memory_plan.Machine", lambda: Machine(tmp_path))
        fake.v2("/", 2 * GIB, used=GIB)
        engine = Engine(base, ServerConfig())
    assert engine.plan.promised == GIB
    assert engine.kv_cache.bytes <= engine.plan.cache < GIB // 4
    assert engine.occupancy.merged_bytes_capacity == engine.plan.merged
    assert engine.occupancy.combined_bytes_capacity == engine.plan.combined


def test_steps_hold_their_logits(llama: Path) -> None:
    base = load_base(str(llama))
    assert step_bytes(base, 512) > 512 * base.spec.vocabulary_size * 4


@pytest.mark.parametrize(
    ("asked", "variable", "cores", "threads", "warns"),
    [
        (None, "", Cores(64, 2.0), 2, False),
        (None, "", Cores(64, 2.9), 2, False),
        (None, "", Cores(2, None), 2, False),
        (None, "", Cores(64, None), 4, False),
        (3, "", Cores(64, 2.0), 3, True),
        (3, "", Cores(64, None), 3, False),
        (None, "4", Cores(64, 2.0), 4, True),
    ],
)
def test_threads(
    asked: int | None,
    variable: str,
    cores: Cores,
    threads: int,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_to: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    with caplog.at_level(logging.INFO, logger="polygraft"):
        set_threads(asked, cores)
    assert set_to == [threads]
    assert f"threads: {threads}, of {cores.allowed} cores" in caplog.text
    assert ("lower --threads" in caplog.text) is warns
