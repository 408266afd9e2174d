"""LINEAR combinations: what is refused, and how they are made, kept and given up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polygraft.adapters.linear_combination import check_linear
from polygraft.adapters.registry import Adapter, AdapterRegistry
from polygraft.core.adapter_weights import AdapterWeights, LoraSettings, Targets, by_module
from polygraft.core.primitives import LowRank
from polygraft.engine.engine import Engine
from polygraft.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    InvalidRequest,
    PolygraftError,
    ResourceExhausted,
)
from polygraft_types.requests import (
    AdapterRef,
    CombinationType,
    LoraPath,
    Request,
    ScoreRequest,
    StoppingParams,
)
from tests.engine.asking import PROMPT, check_clean, request, run, tokens_of
from tests.engine.stores import copy_of, load, poison, start_unload, strengthen
from tests.engines import forced_logits, make_engine

LINEAR = CombinationType.LINEAR
SYSTEM = [7 * i % 250 for i in range(50)]  # three blocks of 16, and two tokens more
MEMBERS = (AdapterRef("lora", weight=0.5), AdapterRef("lora-layers", weight=-0.75))


def ask(
    *adapters: str | AdapterRef,
    id: str = "r",
    prompt: list[int] = PROMPT,
    path: LoraPath = LoraPath.UNMERGED,
    steps: int = 4,
) -> Request:
    refs = tuple(AdapterRef(one) if isinstance(one, str) else one for one in adapters)
    stopping = StoppingParams(max_new_tokens=steps, ignore_eos=True)
    return Request(
        id, tuple(prompt), refs, path, path_required=True, stopping=stopping, combination_type=LINEAR
    )


def score(*adapters: str | AdapterRef, id: str = "s") -> ScoreRequest:
    refs = ask(*adapters).adapters
    return ScoreRequest(id, tuple(SYSTEM), ((1, 2), (3,) * 9), refs, combination_type=LINEAR)


REFUSED: list[tuple[Request, type[PolygraftError], str]] = [
    (ask(), InvalidRequest, "combination_type: LINEAR needs adapters to combine"),
    (ask("lora", "nobody"), AdapterNotFound, "adapter 'nobody': not registered"),
    (ask("lora", "lora-layers", "lora"), InvalidRequest, r"adapters\[2\].name: 'lora' is named twice"),
    (ask("lora", "ia3"), InvalidRequest, r"adapters\[1\]: 'ia3' .* LINEAR combination: ia3 is no LoRA of PEFT's"),
    (ask("adalora", "lora"), InvalidRequest, r"adapters\[0\]: 'adalora' .*: adalora is no LoRA of PEFT's"),
    (ask("lora", "prefix"), InvalidRequest, r"adapters\[1\]: 'prefix' .*: prefix_tuning is no LoRA of PEFT's"),
    (ask("dora"), InvalidRequest, r"adapters\[0\]: 'dora' .*: DoRA's magnitude is a norm"),
    (ask("lora", "lora-bias"), InvalidRequest, r"adapters\[1\]: 'lora-bias' .*: PEFT's combinations have no lora_bias"),
    (ask("lora", "lora-tokens"), InvalidRequest, r"adapters\[1\]: .*: PEFT's combinations have the base's own tokens"),
    (ask("lora-saved-norms"), InvalidRequest, r"adapters\[0\]: .*: PEFT's combinations have the base's own tokens"),
    (ask("lora", "lora-all-linear"), InvalidRequest, r"adapters\[1\]: .*: only equal ranks .* their r is 4 and 3"),
    (ask("lora", "rslora-patterns"), InvalidRequest, r"adapters\[1\]: .*: only equal ranks .* their r is 4 and 7"),
    (ask("lora", "lora-regex"), InvalidRequest, r"adapters\[1\]: 'lora-regex' after 'lora': .* or regular expressions"),
    (ask("lora-layers", "lora"), InvalidRequest, r"adapters: .* those of 'lora-layers' it leaves model\.layers\.1\..* out"),
    (ask("lora", "lora-layers", path=LoraPath.MERGED), InvalidRequest, "lora_path: MERGED takes one adapter"),
    (ask("lora", path=LoraPath.MERGED), InvalidRequest, "lora_path: MERGED takes an adapter as it is"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "text"), REFUSED, ids=[text for *_, text in REFUSED])
@pytest.mark.parametrize("scores", [False, True], ids=["generation", "score"])
def test_what_peft_does_not_combine_is_refused_and_holds_nothing(
    engine: Engine, bad: Request, error: type[PolygraftError], text: str, scores: bool
) -> None:
    asked: Request | ScoreRequest = bad
    if scores:
        asked = ScoreRequest(
            "r", bad.prompt, ((1,),), bad.adapters, bad.lora_path, path_required=True, combination_type=LINEAR
        )
    before = engine.combinations.count
    with pytest.raises(error, match=text):
        engine.submit(asked)
    assert all(info.running_requests == 0 for info in engine.adapters.registry.list())
    assert engine.combinations.count == before


def lora(
    ranks: Mapping[str, int], rank: int, *, named: tuple[str, ...] = (), kept: tuple[str, ...] | None = None,
    invocation: tuple[int, ...] = (), tied: bool = False, has_parameters: bool = False,
) -> AdapterWeights:  # fmt: skip
    targets = Targets(tuple(ranks), frozenset(named or ranks), None if kept is None else frozenset(kept))
    return AdapterWeights(
        "lora",
        1,
        by_module(
            low_rank={name: LowRank(torch.zeros(r, 4), torch.zeros(4, r)) for name, r in ranks.items()}
        ),
        invocation=invocation,
        lora=LoraSettings(
            rank,
            rslora=False,
            scalings=dict.fromkeys(ranks, 1.0),
            targets=targets,
            tied=tied,
            has_parameters=has_parameters,
        ),
    )


PLAIN = lora({"a": 2, "b": 2}, 2)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (PLAIN, lora({"b": 1}, 2), r"adapters\[1\]: 'y' after 'x': .* theirs on b are 2 and 1"),
        (PLAIN, replace(PLAIN, lora=None), r"adapters\[1\]: 'y' .*: lora is no LoRA of PEFT's"),
        (
            lora({"a": 2}, 2, invocation=(1,)),
            PLAIN,
            r"adapters\[0\]: 'x' .*: an activated LoRA begins inside",
        ),
        (PLAIN, lora({"a": 2}, 2, tied=True), r"adapters\[1\]: 'y' .* leave the head out"),
        (PLAIN, lora({"a": 2}, 2, has_parameters=True), r"adapters\[1\]: 'y' .* target_parameters"),
        (PLAIN, lora({"b": 2}, 2, named=("b", "c")), "adapters: .* those of 'x' it has no weights for c"),
        (lora({"a": 2}, 2, kept=("a", "c")), PLAIN, "adapters: .* those of 'x' it leaves b out"),
    ],
)
def test_what_peft_would_leave_out_is_refused(
    first: AdapterWeights, second: AdapterWeights, text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        check_linear(members(first, second))


def test_what_peft_leaves_in_goes_together() -> None:
    check_linear(members(PLAIN, lora({"b": 2}, 2)))
    check_linear(members(lora({"a": 2}, 2, named=("a", "b"), kept=("a", "c")), lora({"c": 2}, 2)))


def members(*compiled: AdapterWeights) -> list[tuple[Adapter, float]]:
    registry = AdapterRegistry(9)
    return [(registry.new_adapter(name, c, 0), 1.0) for name, c in zip("xy", compiled, strict=True)]


def test_one_is_made_at_its_first_use_and_kept(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    resident = engine.adapters._bank.resident
    [(_, first, end)] = run(engine, ask(*MEMBERS))
    held = engine.occupancy
    lora = engine.adapters.registry.get("lora").compiled_bytes
    assert (held.combinations, held.combined_bytes) == (1, lora)
    assert held.combined_bytes_capacity == engine.plan.combined
    assert engine.adapters._bank.resident == resident + 1
    assert end.path is LoraPath.UNMERGED
    assert len(end.adapter_generations) == 2
    [(_, again, _), (_, other, _)] = run(
        engine, ask(*MEMBERS, id="b"), ask(MEMBERS[0], AdapterRef("lora-layers", weight=0.75), id="c")
    )
    assert again == first != other
    assert engine.combinations.count == 2
    check_clean(engine)


def test_nobody_waits_for_one_that_is_being_made_but_its_own(engine: Engine) -> None:
    fresh = (AdapterRef("lora", weight=0.123), AdapterRef("lora-layers"))
    engine.submit(ask(*fresh, id="combined"))
    engine.submit(request(PROMPT, "lora", id="other", max_new_tokens=4, ignore_eos=True))
    outputs = engine.step().outputs
    assert [output.request_id for output in outputs] == ["other"]
    while engine.has_work:
        outputs += engine.step().outputs
    assert len(tokens_of([output for output in outputs if output.request_id == "combined"])) == 4


def test_scores_of_what_was_generated(engine: Engine) -> None:
    [(_, tokens, _)] = run(engine, ask(*MEMBERS, prompt=SYSTEM, steps=6))
    asked = replace(score(*MEMBERS), continuations=(tuple(tokens), (*tokens[:-1], 3)))
    [[output]] = engine.generate([asked])
    assert [one.is_greedy for one in output.scores] == [True, tokens[-1] == 3]


@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_time_frees_everything(engine: Engine, steps: int) -> None:
    weighted = AdapterRef("lora", weight=1 + steps)  # one that isn't there yet
    engine.submit(ask(weighted, "lora-layers", steps=50))
    engine.submit(score(weighted, "lora-layers"))
    for _ in range(steps):
        engine.step()
    engine.abort("r")
    engine.abort("s")
    engine.finish_background()
    check_clean(engine)


def test_one_that_nobody_waits_for_any_more_is_not_made(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    resident = engine.adapters._bank.resident
    engine.submit(ask(*MEMBERS))
    engine.abort("r")
    engine.finish_background()
    assert (engine.combinations.count, engine.combinations.bytes) == (0, 0)
    assert engine.adapters._bank.resident == resident
    check_clean(engine)


@pytest.mark.parametrize("slices", range(0, 12, 3))
def test_unloading_a_member_while_one_is_made(
    llama: Path, llama_store: Path, tmp_path: Path, slices: int
) -> None:
    engine = make_engine(llama, copy_of(llama_store, tmp_path / "store", "lora", "lora-layers"))
    engine.submit(ask(*MEMBERS))
    for _ in range(slices):
        engine.background._run(1e-9)
    done = start_unload(engine, "lora")
    assert not done.done()
    engine.abort("r")
    engine.adapters.collect()
    assert done.result(0).name == "lora"
    engine.finish_background()
    assert (engine.combinations.count, engine.combinations.bytes) == (0, 0)
    assert engine.adapters._bank.resident == 1
    check_clean(engine)


def test_a_member_that_is_unloaded_waits_for_requests_and_takes_the_combination_along(
    llama: Path, llama_store: Path, tmp_path: Path
) -> None:
    engine = make_engine(llama, copy_of(llama_store, tmp_path / "store", "lora", "lora-layers", "lora-head"))
    run(engine, ask("lora", "lora-head", id="stays"), ask("lora-layers", id="alone"))
    engine.submit(ask(*MEMBERS, steps=20))
    while not engine.scheduler.running:
        engine.step()
    done = start_unload(engine, "lora-layers")
    engine.step()
    assert not done.done()
    while engine.has_work:
        engine.step()
    assert done.result(0).name == "lora-layers"
    assert engine.combinations.count == 1
    assert engine.adapters._bank.resident == 3
    check_clean(engine)


def test_a_member_that_is_reloaded_is_another_combination(
    llama: Path, llama_store: Path, tmp_path: Path
) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora", "lora-layers")
    engine = make_engine(llama, store)
    [(_, before, _)] = run(engine, ask(*MEMBERS, prompt=SYSTEM, steps=8))
    strengthen(store / "lora")
    load(engine, "lora", reload=True)
    assert engine.combinations.count == 0
    [(_, after, end)] = run(engine, ask(*MEMBERS, prompt=SYSTEM, steps=8))
    assert after != before
    assert end.usage.cached_tokens == 0
    assert engine.combinations.count == 1
    check_clean(engine)


def test_combinations_share_no_blocks_with_others(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, kv_cache_bytes=8 * 2**20)
    asked = [
        ask("lora", "lora-layers"), ask("lora", "lora-head"), ask(*MEMBERS), ask("lora"),
        replace(ask("lora", "lora-layers"), combination_type=CombinationType.STACK),
        replace(ask("lora"), combination_type=CombinationType.STACK),
    ]  # fmt: skip
    for expected in (0, 48):
        for at, one in enumerate(asked):
            [(_, _, end)] = run(engine, replace(one, id=f"{expected}-{at}", prompt=tuple(SYSTEM)))
            assert end.usage.cached_tokens == expected
    check_clean(engine)


def test_what_is_over_the_memory_for_all_is_refused(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, combined_bytes=1000)
    with pytest.raises(AdapterUnavailable, match=r"'lora': the LINEAR .* --combined-bytes allows 1000"):
        engine.submit(ask(*MEMBERS))
    check_clean(engine)


def test_unused_ones_give_way_and_used_ones_are_waited_for(llama: Path, llama_store: Path) -> None:
    roomy = make_engine(llama, llama_store)
    size = roomy.adapters.registry.get("lora").compiled_bytes
    engine = make_engine(llama, llama_store, combined_bytes=size + size // 2)
    asked = [ask(AdapterRef("lora", weight=1 + n), "lora-layers", id=f"{n}", steps=5 + n) for n in range(4)]
    expected = [tokens for _, tokens, _ in run(roomy, *asked)]
    assert [tokens for _, tokens, _ in run(engine, *asked)] == expected  # one after another
    assert (engine.combinations.count, roomy.combinations.count) == (1, 4)
    assert [run(engine, one)[0][1] for one in asked] == expected
    assert engine.combinations.bytes == size
    check_clean(engine)


def test_there_are_no_more_of_them_than_of_adapters(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora", "lora-layers")
    engine = make_engine(llama, store, max_adapters=2)
    run(engine, *(ask(AdapterRef("lora", weight=n), "lora-layers", id=f"{n}") for n in range(5)))
    assert engine.combinations.count == 2
    check_clean(engine)


def test_a_failure_ends_its_requests_alone_and_the_next_may_succeed(
    llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, llama_store)
    neighbour = request(PROMPT, "lora", id="n", max_new_tokens=4, ignore_eos=True)
    [(_, expected, _)] = run(engine, neighbour)

    def full(compiled: AdapterWeights) -> int:
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(engine.adapters._bank, "install", full)
        failed, scored, other = engine.generate([ask(*MEMBERS), score(*MEMBERS), neighbour])
    for outputs in (failed, scored):
        assert isinstance(outputs[-1].error, ResourceExhausted)
        assert "none left" in str(outputs[-1].error)
    assert tokens_of(other) == expected
    assert engine.combinations.count == engine.combinations.bytes == 0
    check_clean(engine)
    run(engine, ask(*MEMBERS))
    assert engine.combinations.count == 1
    check_clean(engine)


def test_sums_that_are_not_finite_are_refused(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    engine = make_engine(llama, copy_of(llama_store, tmp_path / "store", "lora", "lora-layers"))
    poison(engine, "lora-layers")
    [[output]] = engine.generate([ask(*MEMBERS)])
    assert isinstance(output.error, InvalidRequest)
    assert "adapters: their LINEAR combination isn't finite on model.layers.0" in str(output.error)
    check_clean(engine)


def test_rows_are_the_same_preempted_and_in_chunks(llama: Path, llama_store: Path) -> None:
    plain = make_engine(llama, llama_store, prefix_caching=False)
    crowded = make_engine(
        llama, llama_store, kv_cache_bytes=160_000, max_num_seqs=9, max_num_batched_tokens=24
    )
    kinds = [
        ask(*MEMBERS), ask("lora", "lora-head"), replace(ask(*MEMBERS), combination_type=CombinationType.STACK)
    ]  # fmt: skip
    requests = [
        replace(
            kinds[n % 3],
            id=f"{n}",
            prompt=(*SYSTEM[: 20 + n], n),
            stopping=StoppingParams(max_new_tokens=40, ignore_eos=True),
        )
        for n in range(20)
    ]
    expected, found = run(plain, *requests), run(crowded, *requests)
    assert [tokens for _, tokens, _ in found] == [tokens for _, tokens, _ in expected]
    assert sum(end.preemptions for *_, end in found) > 0
    check_clean(crowded)


def test_a_row_is_the_same_to_the_bit_alone_and_among_others(engine: Engine) -> None:
    [alone] = forced_logits(engine, [(PROMPT, MEMBERS)], [LINEAR])
    others = [(PROMPT[:9], MEMBERS), (PROMPT, MEMBERS), (PROMPT, "lora"), (PROMPT, MEMBERS), (PROMPT, None)]
    combined = [LINEAR, CombinationType.STACK, CombinationType.STACK, LINEAR, LINEAR]
    assert torch.equal(forced_logits(engine, others, combined)[3], alone)


def test_step_statistics_count_the_members(engine: Engine) -> None:
    engine.submit(ask(*MEMBERS))
    while (stats := engine.step().stats) is None:
        pass
    assert set(stats.adapters) == {("lora", "lora"), ("lora-layers", "lora")}
    engine.abort("r")
