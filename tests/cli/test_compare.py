"""`polygraft bench compare`: what is compared, what is sent, and what is made of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polygraft.cli.bench.compare.cells import Cell, Mix, comparable, mixes
from polygraft.cli.bench.compare.cells import Path as Way
from polygraft.cli.bench.compare.panels import rows
from polygraft.cli.bench.compare.plots import svg
from polygraft.cli.bench.compare.result import Comparison, Figures, Round, Size, figures
from polygraft.cli.bench.compare.scraped import Counts
from polygraft.cli.bench.compare.verdict import caveats, crossovers, headline, verdicts
from polygraft.cli.bench.plan import Choice, plan
from polygraft.cli.bench.run import Measured
from polygraft_api.v1 import adapters_pb2, inference_pb2
from polygraft_client._responses import adapter_from
from tests.client.scripted import Script, adapter

from .conftest import Invoke


def mergeable(name: str, rank: int = 8) -> adapters_pb2.Adapter:
    copy = adapters_pb2.MergedCopy(
        state=adapters_pb2.MERGE_STATE_READY,
        memory_bytes=1000,
        dtype="bfloat16",
        merge_seconds=0.5,
        deviation=adapters_pb2.Deviation(largest=0.5, mean=0.25, greedy_agreement=0.75, positions=8),
    )
    return adapter(name, rank=rank, mergeable=True, merged=copy)


def cell(distinct: int, concurrency: int, path: str, rate: float) -> Figures:
    return Figures(str(distinct), distinct, concurrency, path, rate, {}, {}, None, None, None, (rate, rate))


def test_mixes_are_of_adapters_alike() -> None:
    served = [
        mergeable("other", rank=4), mergeable("b"), mergeable("a"), adapter("prefix", virtual_tokens=8),
        adapter("dense", mergeable=True, merged_only=True),
        adapter("failed", mergeable=True, state=adapters_pb2.ADAPTER_STATE_FAILED),
    ]  # fmt: skip
    names = comparable([adapter_from(each) for each in served])
    assert names == ["a", "b", "other"]
    found = mixes(names, [1, 2, 8], zipf=True)
    assert [(mix.name, mix.adapters) for mix in found] == [
        ("1", ("a",)),
        ("2", ("a", "b")),
        ("zipf 3", ("a", "b", "other")),
    ]
    assert found[2].choice is Choice.ZIPF
    assert [mix.name for mix in mixes(names[:2], [1, 2], zipf=True)] == ["1", "2"]


def test_no_path_finds_anothers_prompts_in_the_cache() -> None:
    one = Cell(Mix("2", ("a", "b")), 4)
    planned = {path: next(plan(one.load(path, 8, 4, 100, seed=3))) for path in Way}
    later = {path: next(plan(one.load(path, 8, 4, 100, seed=4))) for path in Way}
    assert len({each.token_ids for each in (*planned.values(), *later.values())}) == 2 * len(Way)
    assert planned[Way.BASE].adapter == ""
    assert {planned[path].adapter for path in Way if path is not Way.BASE} <= {"a", "b"}
    assert [each.lora_path for each in planned.values()] == [None, "UNMERGED", "MERGED", "AUTO"]


def test_rounds_become_figures() -> None:
    def result(first: float) -> Measured:
        return Measured("a", first_token=first, total=1.0, tokens=10, intervals=[0.01, 0.03])

    rounds = [Round([result(0.1)] * 4, seconds, Counts(5, 2, 1, 99)) for seconds in (1.0, 2.0, 10.0)]
    found = figures("1", 1, 4, "merged", rounds)
    assert found.tokens_per_s == 20.0
    assert (found.steps, found.merged_steps, found.switches) == (15, 6, 3)
    assert found.inter_token_latency_ms["p50"] == 20.0
    assert found.time_to_first_token_ms["p99"] == 100.0
    assert Counts(7, 3, 2, 9).since(Counts(5, 3, 1, 8)) == Counts(2, 0, 1, 9)


def test_the_crossover_is_where_unmerged_begins_to_win() -> None:
    cells = [
        cell(n, c, path, rate)
        for c, rates in {
            4: {1: (101, 100), 2: (103, 100), 4: (150, 50)},
            16: {1: (90, 100), 2: (99, 100)},
        }.items()
        for n, pair in rates.items()
        for path, rate in zip(("unmerged", "merged"), pair, strict=True)
    ]
    assert crossovers([*cells, cell(1, 1, "base", 5.0)]) == {"4": 2, "16": None}


class _Page(HTMLParser):
    """Notes tags that stay open, and what would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]


def test_a_comparison_against_a_running_server(call: Invoke, script: Script, tmp_path: Path) -> None:
    script.adapters = [
        mergeable("a"),
        mergeable("b"),
        mergeable("<c>", rank=4),
        mergeable("scales", rank=0),
        adapter("p", virtual_tokens=6),
    ]
    out = tmp_path / "out"
    result = call(
        "bench", "compare", "--concurrency", "1,2", "--mix", "1,2,zipf", "--rounds", 2, "--pairs", 2,
        "--new-tokens", 3, "--steady", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((out / "compare.json").read_text())
    assert [(c["mix"], c["concurrency"], c["path"]) for c in found["cells"]][:5] == [
        ("1", 1, "base"),
        ("1", 1, "unmerged"),
        ("1", 1, "merged"),
        ("1", 1, "auto"),
        ("1", 2, "base"),
    ]
    assert len(found["cells"]) == 3 * 2 * 4
    assert {pair["path"] for pair in found["pairs"]} == {"base", "unmerged", "merged", "auto"}
    assert found["copies"][0]["greedy_agreement"] == 0.75
    assert {(s["kind"], s["size"], s["path"]) for s in found["sizes"]} == {
        ("rank", 4, "unmerged"), ("rank", 4, "merged"), ("rank", 8, "unmerged"), ("rank", 8, "merged"),
        ("virtual tokens", 6, "unmerged"),
    }  # fmt: skip
    asked = [r for r in script.requests if isinstance(r, inference_pb2.GenerateRequest)]
    assert {r.lora_path for r in asked if not r.adapter} == {inference_pb2.LORA_PATH_UNSPECIFIED}
    assert {r.lora_path for r in asked if r.adapter} == {
        inference_pb2.LORA_PATH_UNMERGED,
        inference_pb2.LORA_PATH_MERGED,
        inference_pb2.LORA_PATH_AUTO,
    }
    assert "by mix, concurrency and path" in result.stdout
    text = (out / "compare.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.fetched == []
    panels, markers = 2 + 3 + 3 + 2, 4
    assert (page.count["svg"], page.count["table"]) == (panels + markers, 4)
    assert "&lt;c&gt;" in text
    assert "<c>" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_json_for_programs(call: Invoke, script: Script) -> None:
    script.adapters = [mergeable("a")]
    result = call(
        "bench", "compare", "--concurrency", 1, "--mix", 1, "--rounds", 1, "--pairs", 0, "--paths",
        "base,unmerged", "--new-tokens", 3, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [c["path"] for c in found["cells"]] == ["base", "unmerged"]
    assert (found["pairs"], found["copies"], found["phases"], found["switch_ms"]) == ([], [], [], None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--paths", "base,other"), "--paths: expected some of base,unmerged,merged,auto"),
        (("--concurrency", "1,x"), "--concurrency: expected whole numbers"),
        (("--concurrency", "0"), "--concurrency: must be at least 1"),
        (("--mix", "1,two"), "--mix: expected whole numbers"),
    ],
)
def test_bad_options(call: Invoke, arguments: tuple[str, str], text: str) -> None:
    result = call("bench", "compare", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_server_without_mergeable_adapters(call: Invoke, script: Script) -> None:
    script.adapters = [adapter("p", virtual_tokens=6)]
    result = call("bench", "compare")
    assert result.exit_code == 2
    assert "no adapter is ready that can be merged" in result.stderr


def measured(
    distinct: int, concurrency: int, path: str, rates: tuple[float, ...], p50: float = 10.0, p99: float = 20.0
) -> Figures:
    latency = {"p50": p50, "p90": p50, "p95": p99, "p99": p99}
    rate = sorted(rates)[len(rates) // 2]
    return Figures(
        str(distinct), distinct, concurrency, path, rate, latency, latency, None, None, None, rates
    )  # fmt: skip


def comparison(cells: list[Figures], rounds: int = 3) -> Comparison:
    return Comparison("m", "bfloat16", "none", "0.1.0", "Linux", 64, 64, rounds, cells)


WILD = [
    measured(n, c, path, (rate, rate * 1.1, rate * 0.9), p50, p99)
    for c in (1, 4, 16)
    for n, path, rate, p50, p99 in (
        (1, "base", 500.0 * c, 3.0, 4.0), (1, "unmerged", 1e-3, 900.0, 90_000.0), (1, "merged", 5e5, 0.01, 0.02),
        (8, "unmerged", 300.0, 5.0, 6.0), (8, "merged", 0.5, 4000.0, 1e6),
    )
]  # fmt: skip


def test_no_curve_leaves_its_panel() -> None:
    found = comparison(WILD)
    found.sizes = [Size("rank", r, "a", "unmerged", r * 1.5) for r in (4, 8, 256)]
    shown = rows(found)
    assert [row.title.partition(" (")[0] for row in shown] == [
        "Throughput by distinct adapters", "Typical time between tokens", "Slowest time between tokens",
        "Time between tokens by rank, one request in flight",
    ]  # fmt: skip
    for row in shown:
        for panel in row.panels:
            low, high = panel.limits
            assert (low > 0) == panel.is_log
            for curve in panel.curves:
                assert all(low <= value <= high for value in (*curve.y, *curve.low, *curve.high))
                assert set(curve.x) <= set(panel.ticks)
    assert len({panel.limits for panel in shown[1].panels}) == 1, "latencies can be compared"
    assert shown[2].panels[0].is_log, "the slowest don't flatten the others"
    assert [panel.title for panel in shown[0].panels] == [
        "1 request in flight", "4 requests in flight", "16 requests in flight"
    ]  # fmt: skip


def test_a_panel_is_drawn_with_plain_ticks_in_the_pages_colours() -> None:
    drawn = svg(rows(comparison(WILD))[0].panels[1], "tokens/s")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert {"1", "8", "4 requests in flight", "tokens/s", "distinct adapters"} <= set(texts)
    assert not re.search(r"2\^|mathdefault|\$", drawn)
    assert "currentColor" in drawn
    assert "#010203" not in drawn


def test_only_what_the_rounds_agree_on_is_called_faster() -> None:
    cells = [
        measured(1, 4, "unmerged", (90.0, 95.0, 101.0)), measured(1, 4, "merged", (100.0, 105.0, 110.0)),
        measured(2, 4, "unmerged", (150.0, 155.0, 160.0)), measured(2, 4, "merged", (100.0, 105.0, 110.0)),
        measured(8, 4, "unmerged", (300.0, 305.0, 310.0)), measured(8, 4, "merged", (100.0, 105.0, 110.0)),
        measured(1, 1, "unmerged", (50.0, 50.0)), measured(1, 1, "merged", (60.0, 60.0)),
    ]  # fmt: skip
    first, second = verdicts(cells)
    assert (
        first.sentence() == "1 request in flight: merged is faster with 1 adapter (1.20 times the tokens/s)"
    )
    assert second.sentence() == (
        "4 requests in flight: unmerged is faster with 2, 8 adapters (1.48 to 2.90 times the tokens/s); "
        "no clear difference with 1 adapter"
    )
    assert second.short() == "unmerged faster from 2 adapters on"
    assert crossovers(cells) == {"1": None, "4": 2}
    assert headline(comparison(cells)) == (
        "Of 4 loads, unmerged LoRA is clearly faster on 2, merged on 1; 1 is too close to call."
    )


def test_few_or_noisy_rounds_are_said_to_be_so() -> None:
    once = [measured(1, 1, "unmerged", (50.0,)), measured(1, 1, "merged", (100.0,))]
    (line,) = caveats(comparison(once, rounds=1))
    assert line.startswith("Only 1 round: differences may be noise, and none is called clear.")
    assert verdicts(once)[0].sentence() == "1 request in flight: no clear difference with 1 adapter"
    noisy = [measured(1, 1, "unmerged", (50.0, 80.0, 110.0)), measured(1, 1, "merged", (50.0, 100.0, 130.0))]
    (line,) = caveats(comparison(noisy))
    assert line.startswith("The rounds of a load differ by 78% (median)")
    calm = [measured(1, 1, "unmerged", (100.0, 101.0, 102.0))]
    assert caveats(comparison(calm)) == []
