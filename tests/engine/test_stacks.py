"""Requests with several adapters: what is refused, what they hold, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.adapters.registry import AdapterRegistry
from polygraft.adapters.stack import check_stack
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Kron, LowRank, Rotation, Scale
from polygraft.core.residual_primitives import Bottleneck, Coupling, CouplingLayers
from polygraft.engine.engine import Engine
from polygraft.errors import AdapterNotFound, ContextLengthExceeded, InvalidRequest, PolygraftError
from polygraft_types.requests import AdapterRef, LoraPath, Request, ScoreRequest, StoppingParams
from tests.engine.asking import PROMPT, check_clean, run
from tests.engine.stores import copy_of, load, start_unload, strengthen
from tests.engines import forced_logits, make_engine

SYSTEM = [7 * i % 250 for i in range(50)]  # three blocks of 16, and two tokens more


def refs(*members: str | tuple[str, float]) -> tuple[AdapterRef, ...]:
    return tuple(
        AdapterRef(member) if isinstance(member, str) else AdapterRef(member[0], weight=member[1])
        for member in members
    )


def ask(
    *members: str | tuple[str, float],
    id: str = "r",
    prompt: list[int] = PROMPT,
    path: LoraPath = LoraPath.UNMERGED,
    required: bool = True,
    steps: int = 4,
) -> Request:
    stopping = StoppingParams(max_new_tokens=steps, ignore_eos=True)
    return Request(id, tuple(prompt), refs(*members), path, required, stopping=stopping)


REFUSED: list[tuple[Request, type[PolygraftError], str]] = [
    (ask("lora", "nobody"), AdapterNotFound, "adapter 'nobody': not registered"),
    (ask("lora", "lora-bias", "lora"), InvalidRequest, r"adapters\[2\].name: 'lora' is named twice"),
    (ask("prefix", "lora", "prompt"), InvalidRequest, r"adapters\[2\]: 'prompt' after 'prefix': both have virtual"),
    (ask("prompt", "p-tuning"), InvalidRequest, r"adapters\[1\]: .* both have virtual tokens"),
    (ask("cartridge", "prefix"), InvalidRequest, r"adapters\[1\]: .* both have virtual tokens"),
    (ask("lora", "ia3"), InvalidRequest, r"adapters\[1\]: 'ia3' after 'lora': it scales the input of .*down_proj"),
    (ask(("ia3", 0.5)), InvalidRequest, r"adapters\[0\].weight: must be 1 for 'ia3': .*, and ia3 has scale"),
    (ask("lora", "oft"), InvalidRequest, r"adapters\[1\]: 'oft' after 'lora': it rotates the input of .*down_proj"),
    (ask("lokr", "oft"), InvalidRequest, r"adapters\[1\]: 'oft' after 'lokr': it rotates the input of .*down_proj"),
    (ask("lokr", "ia3"), InvalidRequest, r"adapters\[1\]: 'ia3' after 'lokr': it scales the input of .*down_proj"),
    (ask("lora", "hra"), InvalidRequest, r"adapters\[1\]: 'hra' after 'lora': it makes a reflection of the base's weights of"),
    (ask("hra", "hra-orthogonal"), InvalidRequest, r"adapters\[1\]: .* it makes a reflection of the base's weights of"),
    (ask("hra", "dora"), InvalidRequest, r"adapters\[1\]: .* is a norm of the base's weights, not of a reflection"),
    (ask("boft", "oft"), InvalidRequest, r"adapters\[1\]: .* where one rotates the inputs, isn't defined"),
    (ask("ia3", "oft"), InvalidRequest, r"adapters\[1\]: .* where one rotates the inputs, isn't defined"),
    (ask("boft", "dora"), InvalidRequest, r"adapters\[1\]: .* where one rotates the inputs, isn't defined"),
    (ask(("oft", 0.5)), InvalidRequest, r"adapters\[0\].weight: must be 1 for 'oft': .*, and oft has rotation"),
    (ask(("hra", 0.5)), InvalidRequest, r"adapters\[0\].weight: must be 1 for 'hra': .*, and hra has reflection"),
    (ask("lora", ("dora", 2.0)), InvalidRequest, r"adapters\[1\].weight: .* lora has low_rank and scale"),
    (ask("lora", ("prefix", 0.0)), InvalidRequest, r"adapters\[1\].weight: .* prefix_tuning has prefix"),
    (ask(("prompt", -1.0), "lora"), InvalidRequest, r"adapters\[0\].weight: .* prompt_tuning has soft_prompt"),
    (ask("lora", "lora-bias", path=LoraPath.MERGED), InvalidRequest, "lora_path: MERGED takes one adapter"),
    (ask(("lora", 0.5), path=LoraPath.MERGED), InvalidRequest, "lora_path: MERGED takes an adapter of weight 1"),
    (ask("lora", "prompt", steps=223), ContextLengthExceeded, "6 virtual "),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "text"), REFUSED, ids=[text for *_, text in REFUSED])
@pytest.mark.parametrize("scores", [False, True], ids=["generation", "score"])
def test_what_has_no_meaning_is_refused_and_holds_nothing(
    engine: Engine, bad: Request, error: type[PolygraftError], text: str, scores: bool
) -> None:
    request: Request | ScoreRequest = bad
    if scores:
        long = (1,) * (bad.stopping.max_new_tokens or 0)
        request = ScoreRequest("r", bad.prompt, (long,), bad.adapters, bad.lora_path, True)
    with pytest.raises(error, match=text):
        engine.submit(request)
    assert all(info.running_requests == 0 for info in engine.adapters.registry.list())


def test_two_doras_are_refused_where_they_meet(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    store = copy_of(llama_store, tmp_path / "store", "dora", "lora")
    (store / "dora").rename(store / "one")
    copy_of(llama_store, store, "dora")
    strengthen(store / "dora")
    engine = make_engine(llama, store)
    with pytest.raises(
        InvalidRequest, match=r"adapters\[1\]: 'dora' after 'one': both are DoRA on model\.layers"
    ):
        engine.submit(ask("one", "dora"))
    assert run(engine, ask("one", "lora"))


BOTTLENECK = Bottleneck(torch.zeros(2, 4), torch.zeros(4, 2), "relu", "sum")
HALF = CouplingLayers(torch.zeros(1, 2), torch.zeros(1), torch.zeros(2, 1), torch.zeros(2))
LOW_RANK = {"m": LowRank(torch.zeros(1, 4), torch.zeros(4, 1))}


class Unheard(AdapterWeights):
    """One that has a primitive of which stacks know nothing."""

    @property
    def primitives(self) -> tuple[str, ...]:
        return ("telepathy",)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (
            AdapterWeights("a", 1, bottlenecks={"x": BOTTLENECK, "y": BOTTLENECK}),
            AdapterWeights("b", 1, bottlenecks={"y": BOTTLENECK}),
            "both have a bottleneck at y",
        ),
        (
            AdapterWeights("a", 1, coupling=Coupling(HALF, HALF, "relu")),
            AdapterWeights("b", 1, coupling=Coupling(HALF, HALF, "relu")),
            "both are invertible adapters",
        ),
        (
            AdapterWeights("a", 1, by_module(kron={"m": Kron(torch.zeros(1, 1), torch.zeros(4, 4))})),
            AdapterWeights("b", 1, by_module(rotation={"m": Rotation(torch.zeros(1, 4, 4))})),
            "it rotates the input of m, which the weights that are added before it",
        ),
        (
            AdapterWeights("a", 1, by_module(scale={"m": Scale(output=torch.ones(4))})),
            AdapterWeights("b", 1, by_module(low_rank=LOW_RANK), of_base="projection"),
            "it makes a projection of the base's weights of m, not of what the adapter before it makes of them; name it first",
        ),
        (
            AdapterWeights("a", 1, by_module(low_rank=LOW_RANK)),
            Unheard("b", 1),
            "what telepathy means beside another",
        ),
        (
            Unheard("a", 1),
            AdapterWeights("b", 1, by_module(low_rank=LOW_RANK)),
            "what telepathy means beside another",
        ),
    ],
)
def test_what_stacks_dont_know_is_refused(first: AdapterWeights, second: AdapterWeights, text: str) -> None:
    registry = AdapterRegistry(9)
    members = [(registry.new_adapter(c.kind, c, 0), 1.0) for c in (first, second)]
    with pytest.raises(InvalidRequest, match=rf"adapters\[1\]: 'b' after 'a': {text}"):
        check_stack(members)
    check_stack(members[:1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            AdapterWeights("a", 1, bottlenecks={"x": BOTTLENECK}),
            AdapterWeights("b", 1, bottlenecks={"y": BOTTLENECK}),
        ),
        (
            AdapterWeights("a", 1, by_module(low_rank=LOW_RANK)),
            AdapterWeights("b", 1, bottlenecks={"y": BOTTLENECK}),
        ),
        (
            AdapterWeights("a", 1, by_module(scale={"m": Scale(input=torch.ones(4))})),
            AdapterWeights("b", 1, by_module(low_rank=LOW_RANK)),
        ),
        (
            AdapterWeights("a", 1, by_module(low_rank=LOW_RANK)),
            AdapterWeights(
                "b", 1, by_module(scale={"m": Scale(output=torch.ones(4)), "n": Scale(torch.ones(4))})
            ),
        ),
        (
            AdapterWeights("a", 1, by_module(scale={"m": Scale(output=torch.ones(4))}, low_rank=LOW_RANK)),
            AdapterWeights("b", 1, by_module(scale={"m": Scale(output=torch.ones(4))})),
        ),
    ],
)
def test_what_does_not_meet_goes_together(first: AdapterWeights, second: AdapterWeights) -> None:
    registry = AdapterRegistry(9)
    check_stack([(registry.new_adapter(c.kind, c, 0), 1.0) for c in (first, second)])


def test_every_adapter_is_held_until_the_end_and_named_in_it(engine: Engine) -> None:
    registry = engine.adapters.registry
    names = ("lora", "prompt", "lora-bias")
    generations = tuple(registry.get(name).generation for name in names)
    engine.submit(ask(*names))
    engine.step()
    assert [registry.get(name).running_requests for name in names] == [1, 1, 1]
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    finished = outputs[-1].finished
    assert finished is not None
    assert finished.adapter_generations == generations
    assert finished.usage.virtual_tokens == 6
    score = ScoreRequest("s", tuple(PROMPT), ((1, 2), (3,)), refs(*names))
    [[output]] = engine.generate([score])
    assert output.finished is not None
    assert output.finished.adapter_generations == generations
    check_clean(engine)


@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_time_frees_everything(engine: Engine, steps: int) -> None:
    request = ask(("lora", 0.5), "p-tuning", "lora-bias", steps=50)
    score = ScoreRequest("s", tuple(SYSTEM), ((1, 2), (3,) * 9), request.adapters)
    engine.submit(request)
    engine.submit(score)
    for _ in range(steps):
        engine.step()
    engine.abort("r")
    engine.abort("s")
    while engine.scheduler.has_work:  # a soft prompt that is under way runs to its end
        engine.step()
    check_clean(engine)


def test_a_member_that_is_unloaded_waits_for_the_stack(
    llama: Path, llama_store: Path, tmp_path: Path
) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora", "prompt", "lora-bias")
    engine = make_engine(llama, store)
    engine.submit(ask("lora", "prompt"))
    engine.step()
    done = start_unload(engine, "lora")
    engine.step()
    assert not done.done()
    with pytest.raises(PolygraftError, match="being unloaded"):
        engine.submit(ask("lora-bias", "lora", id="late"))
    assert engine.adapters.registry.get("lora-bias").running_requests == 0
    while engine.has_work:
        engine.step()
    assert done.result(0).name == "lora"
    # What the prompt was under that adapter is gone with it, and what it is alone may stay.
    assert all(
        "lora" not in (adapter.name for adapter in entry.stack.adapters)
        for entry in engine.scheduler.prefixes._entries.values()
    )
    check_clean(engine)


def test_a_member_that_is_reloaded_is_another_stack(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora", "prompt")
    engine = make_engine(llama, store)
    [(_, before, old)] = run(engine, ask("prompt", "lora", prompt=SYSTEM, steps=8))
    strengthen(store / "lora")
    load(engine, "lora", reload=True)
    [(_, after, new)] = run(engine, ask("prompt", "lora", prompt=SYSTEM, steps=8))
    assert new.usage.cached_tokens == 0
    assert new.adapter_generations[0] == old.adapter_generations[0]
    assert new.adapter_generations[1] > old.adapter_generations[1]
    assert after != before
    check_clean(engine)


def test_stacks_share_no_blocks_with_others(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, kv_cache_bytes=8 * 2**20)
    stacks: list[tuple[str | tuple[str, float], ...]] = [
        (), ("lora",), (("lora", 0.5),), ("lora", "lora-bias"), ("lora-bias", "lora"), ("lora", ("lora-bias", 0.5)),
        ("prompt",), ("prompt", "lora"), ("lora", "prefix"), ("prefix",),
    ]  # fmt: skip
    for expected in (0, 48):
        for at, members in enumerate(stacks):
            [(_, _, finished)] = run(engine, ask(*members, id=f"{expected}-{at}", prompt=SYSTEM))
            assert finished.usage.cached_tokens == expected
    check_clean(engine)


def test_a_prefix_is_in_the_cache_once_and_a_soft_prompt_for_each_stack(
    llama: Path, llama_store: Path
) -> None:
    engine = make_engine(llama, llama_store)
    prefixes = engine.scheduler.prefixes
    run(engine, ask("prefix"), ask("prefix", "lora", id="b"), ask("lora", "prefix", id="c"))
    [entry] = [e for e in prefixes._entries.values() if "prefix" in (a.name for a in e.stack.adapters)]
    assert [adapter.name for adapter in entry.stack.adapters] == ["prefix"]
    run(engine, ask("prompt"), ask("prompt", "lora", id="b"), ask(("lora", 0.5), "prompt", id="c"))
    run(engine, ask("prompt", "lora", id="d"))
    of_prompts = [e for e in prefixes._entries.values() if "prompt" in (a.name for a in e.stack.adapters)]
    assert len(of_prompts) == 3
    check_clean(engine)


@pytest.mark.parametrize("path", [LoraPath.AUTO, LoraPath.MERGED])
def test_where_the_path_is_left_to_the_server_a_stack_is_never_merged(
    llama: Path, llama_store: Path, path: LoraPath
) -> None:
    engine = make_engine(llama, llama_store)
    tried = engine.copies.count  # those that loading made of what is served merged only
    for n in range(3):
        requests = [
            ask("lora", "lora-bias", id=f"a{n}", path=path, required=False, steps=20),
            ask(("lora", 0.5), id=f"b{n}", path=path, required=False, steps=20),
        ]
        assert [end.path for *_, end in run(engine, *requests)] == [LoraPath.UNMERGED] * 2
    assert engine.copies.count == tried
    check_clean(engine)


def test_rows_are_the_same_preempted_and_in_chunks(llama: Path, llama_store: Path) -> None:
    plain = make_engine(llama, llama_store, prefix_caching=False)
    crowded = make_engine(
        llama, llama_store, kv_cache_bytes=160_000, max_num_seqs=9, max_num_batched_tokens=24
    )
    stacks: list[tuple[str | tuple[str, float], ...]] = [
        (), ("lora",), ("lora", ("lora-bias", -0.5)), ("prompt", "lora"), ("ia3", "lora", "prefix"),
    ]  # fmt: skip
    requests = [ask(*stacks[n % 5], id=f"{n}", prompt=[*SYSTEM[: 20 + n], n], steps=40) for n in range(20)]
    expected, found = run(plain, *requests), run(crowded, *requests)
    assert [tokens for _, tokens, _ in found] == [tokens for _, tokens, _ in expected]
    assert sum(end.preemptions for *_, end in found) > 0
    check_clean(crowded)


def test_a_row_is_the_same_to_the_bit_alone_and_among_others(engine: Engine) -> None:
    stack = refs(("lora", 0.5), "lora-all-linear", "lora-bias")
    [alone] = forced_logits(engine, [(PROMPT, stack)])
    others = [
        (PROMPT[:9], stack[:1]),
        (PROMPT[:5], stack[:2]),
        (PROMPT, stack),
        (PROMPT, "lora"),
        (PROMPT, None),
    ]
    assert torch.equal(forced_logits(engine, others)[2], alone)


def test_step_statistics_count_every_adapter(engine: Engine) -> None:
    engine.submit(ask("lora", "prefix"))
    stats = engine.step().stats
    assert stats is not None
    assert (set(stats.adapters), stats.base_rows) == ({("lora", "lora"), ("prefix", "prefix_tuning")}, False)
    engine.abort("r")
