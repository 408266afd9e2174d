"""Paged attention: the C++ operator and the one in torch against a plain computation without a cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from polygraft.core.spec import AttentionSite
from polygraft.errors import UnsupportedArchitecture
from polygraft.layers.attention import PagedAttention, Probe, attention_forward
from polygraft.layers.masks import carry_rule
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.step import AttentionPlan, StepContext

LAYER = 3
"""Index of the layer under test."""
pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


@dataclass(frozen=True)
class Row:
    """One sequence of a step: `new` rows behind `past` keys of its own behind `prefix` shared ones, which the
    layer doesn't have if it is `bare`."""

    new: int
    past: int = 0
    prefix: int = 0
    bare: bool = False


def site(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> AttentionSite:
    return AttentionSite(heads, kv_heads, head_dim, value_dim or head_dim, head_dim**-0.5, window, softcap)


class Case:
    """A step over a cache whose unused slots hold NaN."""

    def __init__(
        self,
        rows: list[Row],
        at: AttentionSite,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        sinks: bool = False,
        seed: int = 0,
    ) -> None:
        self.rows, self.site, self.size, self.dtype = rows, at, block_size, dtype
        self.random = torch.Generator().manual_seed(seed)
        self.sinks = self.draw(at.heads) if sinks else None
        # All keys and values of each sequence, by position: prefix, past, new.
        lengths = [row.prefix + row.past + row.new for row in rows]
        self.keys = [self.draw(n, at.kv_heads, at.head_dim) for n in lengths]
        self.values = [self.draw(n, at.kv_heads, at.value_dim) for n in lengths]
        self.queries = [self.draw(row.new, at.heads, at.head_dim) for row in rows]
        self._lay_out()

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def _lay_out(self) -> None:
        size = self.size
        prefix_blocks = [-(-row.prefix // size) for row in self.rows]
        own_blocks = [-(-(row.past + row.new) // size) for row in self.rows]
        total = sum(prefix_blocks) + sum(own_blocks) + 3
        free = torch.randperm(total, generator=self.random).tolist()
        at = self.site
        self.key_cache = torch.full((total, at.kv_heads, at.head_dim, size), torch.nan, dtype=self.dtype)
        self.value_cache = torch.full((total, at.kv_heads, size, at.value_dim), torch.nan, dtype=self.dtype)
        tables, slots = [], []
        for s, row in enumerate(self.rows):
            shared = [free.pop() for _ in range(prefix_blocks[s])]
            own = [free.pop() for _ in range(own_blocks[s])]
            tables.append(shared + own)
            for position in range(row.prefix + row.past + row.new):
                real = position - row.prefix
                block = shared[position // size] if real < 0 else own[real // size]
                offset = position % size if real < 0 else real % size
                if real < 0 and row.bare:
                    continue
                if real >= row.past:
                    slots.append(block * size + offset)
                else:
                    self.key_cache[block, :, :, offset] = self.keys[s][position]
                    self.value_cache[block, :, offset] = self.values[s][position]
        table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
        for s, blocks in enumerate(tables):
            table[s, : len(blocks)] = torch.tensor(blocks)
        starts = torch.tensor([0, *(row.new for row in self.rows)]).cumsum(0)
        self.plan = AttentionPlan(
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            query_start=starts.int(),
            context_lens=torch.tensor([len(keys) for keys in self.keys], dtype=torch.int32),
            prefix_lens=torch.tensor([row.prefix for row in self.rows], dtype=torch.int32),
            block_tables=table,
            bare=self._bare(),
        )

    def _bare(self) -> torch.Tensor | None:
        """What the plan says of `LAYER`; of the other layers the contrary, so that none is mistaken for it."""
        if not any(row.bare for row in self.rows):
            return None
        wanted = torch.tensor([[row.bare] for row in self.rows]).expand(-1, LAYER + 2)
        own = torch.arange(LAYER + 2) == LAYER
        return torch.where(own, wanted, ~wanted).to(torch.uint8).contiguous()

    def new(self, of: list[torch.Tensor]) -> torch.Tensor:
        """[1, heads, rows, dim], as a module passes its projections: a view of [rows, heads * dim]."""
        rows = torch.cat([t[len(t) - row.new :] for t, row in zip(of, self.rows, strict=True)])
        return rows.transpose(0, 1)[None]

    def run(self, native: bool, strided: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output [rows, heads, value_dim] and the cache behind it."""
        step = StepContext(attention=self.plan)
        keys, values = self.key_cache.clone(), self.value_cache.clone()
        attention = PagedAttention(self.site, keys, values, step, load_kernels() if native else None, LAYER)
        assert (attention.kernels is not None) == native
        q, k, v = self.new(self.queries), self.new(self.keys), self.new(self.values)
        if strided:
            packed = torch.cat([t[0].transpose(0, 1).flatten(1) for t in (q, k, v)], -1)
            q, k, v = (
                part.view(1, len(packed), -1, like.shape[-1]).transpose(1, 2)
                for part, like in zip(
                    packed.split([t.shape[1] * t.shape[3] for t in (q, k, v)], -1), (q, k, v), strict=True
                )
            )
        return attention(q, k, v, self.site, self.sinks)[0], keys, values

    def expected(self) -> torch.Tensor:
        """Each row by itself, in float64."""
        out = []
        group = self.site.heads // self.site.kv_heads
        for row, q, k, v in zip(self.rows, self.queries, self.keys, self.values, strict=True):
            keys = k.double().repeat_interleave(group, 1)
            values = v.double().repeat_interleave(group, 1)
            for r in range(row.new):
                high = row.prefix + row.past + r + 1
                low = max(0, high - self.site.window) if self.site.window else 0
                low = max(low, row.prefix) if row.bare else low
                scores = torch.einsum("hd,khd->hk", q[r].double(), keys[low:high]) * self.site.scaling
                if self.site.softcap:
                    scores = self.site.softcap * torch.tanh(scores / self.site.softcap)
                if self.sinks is not None:
                    scores = torch.cat([scores, self.sinks.double()[:, None]], -1)
                weights = scores.softmax(-1)[:, : high - low]
                out.append(torch.einsum("hk,khd->hd", weights, values[low:high]))
        return torch.stack(out)

    def check(self) -> None:
        tolerance = 2e-5 if self.dtype == torch.float32 else 2e-2
        expected = self.expected().float()
        native, native_keys, native_values = self.run(native=True)
        plain, plain_keys, plain_values = self.run(native=False)
        for out in (native, plain):
            assert torch.allclose(out.float(), expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(native_keys.nan_to_num(9e9), plain_keys.nan_to_num(9e9))
        assert torch.equal(native_values.nan_to_num(9e9), plain_values.nan_to_num(9e9))
        written = len(self.plan.slot_mapping) * self.site.kv_heads * self.site.head_dim
        assert int(self.key_cache.isnan().sum() - native_keys.isnan().sum()) == written


rows = st.builds(
    Row,
    new=st.one_of(st.just(1), st.integers(1, 40)),
    past=st.integers(0, 70),
    prefix=st.integers(0, 40),
    bare=st.booleans(),
)


@given(
    step=st.lists(rows, min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 7]),
    head_dim=st.sampled_from([4, 16, 20, 64, 80]),
    value_dim=st.sampled_from([0, 0, 8, 24]),
    window=st.sampled_from([0, 0, 1, 5, 16, 33]),
    softcap=st.sampled_from([0.0, 0.0, 1.5, 30.0]),
    sinks=st.booleans(),
    block_size=st.sampled_from([1, 4, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_any_step(
    step: list[Row],
    kv_heads: int,
    group: int,
    head_dim: int,
    value_dim: int,
    window: int,
    softcap: float,
    sinks: bool,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    at = site(kv_heads * group, kv_heads, head_dim, value_dim, window, softcap)
    Case(step, at, block_size=block_size, dtype=dtype, sinks=sinks, seed=seed).check()


DECODES = [Row(1, past=30), Row(1, past=15), Row(1, past=16), Row(1)]
STEPS: dict[str, list[Row]] = {
    "decodes": DECODES,
    "prefill": [Row(5), Row(37), Row(1)],
    "chunk of a longer prompt": [Row(20, past=45)],
    "decodes beside chunks": [*DECODES, Row(33, past=7), Row(16)],
    "prefix that ends in a block": [Row(1, past=20, prefix=5), Row(9, prefix=5), Row(3, past=2, prefix=17)],
    "prefix that fills its blocks": [Row(1, past=20, prefix=32), Row(9, prefix=16)],
    "layers without the prefix": [
        Row(1, past=20, prefix=5, bare=True),
        Row(9, prefix=32, bare=True),
        Row(4, past=2, prefix=17),
        Row(3),
    ],
    "more rows than a task has": [Row(130, past=3, prefix=3)],
}


@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("step", STEPS)
def test_named_steps(step: str, window: int, block_size: int) -> None:
    Case(STEPS[step], site(6, 2, 20, window=window), block_size=block_size).check()


@pytest.mark.parametrize("shape", [(4, 2, 16, 16), (6, 2, 20, 12)])
def test_projections_that_are_views_of_one_tensor(shape: tuple[int, int, int, int]) -> None:
    case = Case([Row(7, past=4), Row(1, past=9)], site(*shape))
    straight, strided = case.run(native=True), case.run(native=True, strided=True)
    for one, other in zip(straight, strided, strict=True):
        assert torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("where", ["query", "old key", "new value", "infinity"])
def test_nan_in_one_sequence_reaches_no_other_and_is_seen(native: bool, where: str) -> None:
    step = [Row(3, past=5), Row(4, past=6, prefix=3), Row(1, past=17)]
    clean = Case(step, site()).run(native)[0]
    case = Case(step, site())
    if where == "query":
        case.queries[1][-1] = torch.nan
    elif where == "old key":
        case.keys[1][4] = torch.nan
    elif where == "new value":
        case.values[1][-1] = torch.nan
    else:
        case.queries[1][-1] = torch.inf
    case.random.manual_seed(1)
    case._lay_out()
    out = case.run(native)[0]
    assert out[3:7][-1].isnan().all()
    for first, last in ((0, 3), (7, 8)):
        assert torch.equal(out[first:last], clean[first:last])


@pytest.mark.parametrize("native", [True, False])
def test_large_scores_dont_overflow(native: bool) -> None:
    case = Case([Row(4, past=20)], site())
    case.queries[0] *= 1e4
    out = case.run(native)[0]
    assert torch.allclose(out.float(), case.expected().float(), atol=1e-4)


def test_an_answer_depends_on_no_neighbour() -> None:
    together = [Row(5, past=20, prefix=3), Row(1, past=40), Row(17)]
    case = Case(together, site(6, 2, 20))
    out = case.run(native=True)[0]
    first = 0
    for s, row in enumerate(together):
        alone = Case([row], site(6, 2, 20))
        alone.keys, alone.values, alone.queries = [case.keys[s]], [case.values[s]], [case.queries[s]]
        alone._lay_out()
        assert torch.equal(alone.run(native=True)[0], out[first : first + row.new])
        first += row.new


def test_arguments_that_change_the_result_and_arent_known_are_refused() -> None:
    q = torch.zeros(1, 2, 3, 4)
    mask = carry_rule(mask_function=causal_mask_function)
    attention_forward(nn.Identity(), q, q, q, mask, is_causal=True, unheard_of=None)
    with pytest.raises(UnsupportedArchitecture, match=r"Identity passes arguments .* served: unheard_of"):
        attention_forward(nn.Identity(), q, q, q, mask, is_causal=True, unheard_of=1.5)


def test_the_first_call_shows_what_the_layer_is() -> None:
    layer = nn.Identity()
    q, k, v = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 6)
    mask = carry_rule(mask_function=sliding_window_causal_mask_function(5), local_size=5)
    out, _ = attention_forward(layer, q, k, v, mask, sliding_window=5, softcap=2.0)
    assert out.shape == (1, 3, 4, 6)
    probe = layer.polygraft_attention
    assert isinstance(probe, Probe)
    assert probe.site == AttentionSite(4, 2, 8, 6, 8**-0.5, 5, 2.0)


def test_outside_a_step_there_is_no_attention() -> None:
    case = Case([Row(1)], site())
    attention = PagedAttention(site(), case.key_cache, case.value_cache, StepContext(), load_kernels())
    q, k, v = case.new(case.queries), case.new(case.keys), case.new(case.values)
    with pytest.raises(AssertionError, match="outside a step"):
        attention(q, k, v, site(), None)
