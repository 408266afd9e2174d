"""Norms, embeddings and heads with other weights for some of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from polygraft.base.loader import Base, load_base
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank, NormWeights, TokenRows
from polygraft.layers.adapter_bank import AdapterBank
from polygraft.layers.linear.panels import Panels
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.native.structures import NormStruct
from polygraft.layers.replaced.norms import AdaptedNorm
from polygraft.layers.step import AttentionPlan, StepContext
from tests.tiny import CONFIGS, VOCABULARY

PLAN = AttentionPlan(*[torch.zeros(1)] * 5)
HIDDEN = 64


class Served:
    """A tiny base and its bank, with a step of some rows."""

    def __init__(self, folder: Path, precision: str = "float32", *, native: bool = True) -> None:
        self.base: Base = load_base(str(folder), dtype=precision)
        self.step = StepContext()
        self.bank = AdapterBank(self.base.model, self.base.spec, self.step, native)

    def begin(self, runs: list[tuple[int, int, int]], rows: int) -> None:
        segments = self.bank.segments(runs)
        self.step.begin(PLAN, segments, segments, rows)


def adapter(**parts: object) -> AdapterWeights:
    return AdapterWeights("test", 0, **parts)  # type: ignore[arg-type]  # any of its fields


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_norm_has_other_weights_for_an_adapters_rows(
    tiny_model: Callable[[str], Path], architecture: str, precision: str, native: bool
) -> None:
    served = Served(tiny_model(architecture), precision, native=native)
    for name, shape in served.base.spec.norms.items():
        norm = served.base.model.get_submodule(name)
        weight, bias = torch.randn(shape.width), torch.randn(shape.width) if shape.has_bias else None
        slot = served.bank.install(adapter(modules=by_module(norm={name: NormWeights(weight, bias)})))
        size = (1, 7, shape.width) if shape.axis == 1 else (1, 4, 7, shape.width)
        x = torch.randn(size).to(served.base.dtype)
        with torch.inference_mode():
            plain = norm(x)
            served.begin([(2, 5, slot)], rows=7)
            mixed = norm(x)
            served.begin([(0, 7, slot)], rows=7)
            whole = norm(x)
        served.step.end()
        own = torch.zeros(7, dtype=torch.bool)
        own[2:5] = True
        assert torch.equal(mixed.movedim(shape.axis, 0)[own], whole.movedim(shape.axis, 0)[own])
        assert torch.equal(mixed.movedim(shape.axis, 0)[~own], plain.movedim(shape.axis, 0)[~own])
        assert not torch.equal(whole, plain)
        served.bank.remove(slot)
        with torch.inference_mode():
            assert torch.equal(norm(x), plain)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "modules", [("model.embed_tokens",), ("lm_head",), ("model.embed_tokens", "lm_head")]
)
@pytest.mark.parametrize("tokens", [VOCABULARY, VOCABULARY + 9, VOCABULARY - 9])
def test_rows_take_the_place_of_the_bases(
    tiny_model: Callable[[str], Path], modules: tuple[str, ...], precision: str, tokens: int, native: bool
) -> None:
    served = Served(tiny_model("gemma3_text"), precision, native=native)
    model, dtype = served.base.model, served.base.dtype
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = embed.weight.float()
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    some = torch.tensor([0, 3, 100, 250, min(tokens, VOCABULARY) - 1])
    for ids in (None, some):
        weight = own if ids is None else own[ids]
        rows = TokenRows(modules, weight, ids)
        slot = served.bank.install(adapter(token_rows=(rows,), vocabulary=tokens))
        merged = torch.zeros(max(tokens, VOCABULARY), HIDDEN)
        merged[:VOCABULARY] = table
        merged[torch.arange(tokens) if ids is None else ids] = weight.float()
        asked = torch.tensor([[3, 250, 9, 3, 100, 17]])
        x = torch.randn(1, 6, HIDDEN, generator=generator).to(dtype)
        with torch.inference_mode():
            plain, logits = embed(asked), head(x)
            served.begin([(2, 5, slot)], rows=6)
            mixed, mixed_logits = embed(asked), head(x)
            served.bank.replaced.clear_foreign(mixed_logits[0], served.step.head_segments)
        served.step.end()
        others = [0, 1, 5]
        assert torch.equal(mixed[0, others], plain[0, others])
        assert torch.equal(mixed_logits[0, others, :VOCABULARY], logits[0, others])
        assert (mixed_logits[0, others, VOCABULARY:] == -torch.inf).all()
        assert (mixed_logits[0, 2:5, tokens:] == -torch.inf).all()
        tolerance = 1e-5 if precision == "float32" else 2e-2
        source = merged if "model.embed_tokens" in modules else table
        torch.testing.assert_close(
            mixed[0, 2:5].float(), source[asked[0, 2:5]] * 8, atol=tolerance, rtol=tolerance
        )
        if "lm_head" in modules:
            expected = x[0, 2:5].float() @ merged[:tokens].t()
            torch.testing.assert_close(
                mixed_logits[0, 2:5, :tokens].float(), expected, atol=10 * tolerance, rtol=tolerance
            )
        served.bank.remove(slot)
        with torch.inference_mode():
            assert torch.equal(embed(asked), plain)
            assert torch.equal(head(x), logits)


def test_low_rank_weights_on_the_embedding_add_up_by_their_weights(tiny_model: Callable[[str], Path]) -> None:
    served = Served(tiny_model("gemma3_text"))
    embed = served.base.model.get_input_embeddings()
    parts = [LowRank(torch.randn(r, VOCABULARY), torch.randn(HIDDEN, r), scaling=r / 3) for r in (2, 5)]
    first, second = (served.bank.install(adapter(embedding=part)) for part in parts)
    asked = torch.tensor([[3, 250, 9, 3]])
    segments = served.bank.segments([(0, 3, first)], [(1, 3, second, 0.5)])
    with torch.inference_mode():
        plain = embed(asked)
        served.step.begin(PLAN, segments, segments, 4)
        out = embed(asked)
    served.step.end()
    added = [part.product[:, asked[0]].t() * 8 for part in parts]
    torch.testing.assert_close(out[0, 0], plain[0, 0] + added[0][0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        out[0, 1:3], plain[0, 1:3] + (added[0] + 0.5 * added[1])[1:3], atol=1e-4, rtol=1e-5
    )
    assert torch.equal(out[0, 3], plain[0, 3])


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 63])
def test_rows_come_back_out_of_panels(dtype: torch.dtype, inputs: int) -> None:
    weight = torch.randn(70, inputs).to(dtype)
    panels = Panels([weight], 16)
    at = torch.tensor([0, 69, 15, 16, 33, 16])
    assert torch.equal(panels.gather(at), weight[at])


def test_an_embedding_that_does_more_is_recognised(tiny_model: Callable[[str], Path]) -> None:
    for architecture in CONFIGS:
        served = Served(tiny_model(architecture))
        table = served.bank.replaced.table
        assert table is not None
        assert table.is_understood()
        table.base_layer.register_forward_hook(lambda module, args, out: out + 1)
        assert not table.is_understood()


def test_slots_beyond_the_first_tables(tiny_model: Callable[[str], Path]) -> None:
    served = Served(tiny_model("llama"))
    norm = served.base.model.get_submodule("model.norm")
    own = NormWeights(torch.full((HIDDEN,), 3.0))
    slots = [served.bank.install(adapter(modules=by_module(norm={"model.norm": own}))) for _ in range(40)]
    x = torch.randn(1, 2, HIDDEN)
    with torch.inference_mode():
        served.begin([(1, 2, slots[-1])], rows=2)
        out = norm(x)
        served.begin([(1, 2, slots[0])], rows=2)
        assert torch.equal(norm(x), out)
    served.step.end()


def test_operators_are_told_how_many_slots_a_norms_table_has() -> None:
    norm = AdaptedNorm(nn.LayerNorm(4), 0, 1, StepContext())
    struct = NormStruct()
    norm.bind(struct)
    assert struct.slots == 0
    for slot in (1, 40, 3):
        norm.install(slot, NormWeights(torch.ones(4), torch.ones(4)))
        assert struct.slots == len(norm._table) > slot
        assert struct.table == norm._table.data_ptr()


def test_what_is_kept_is_counted() -> None:
    rows = TokenRows(("a", "b"), torch.zeros(5, 4), torch.arange(5))
    both = adapter(
        token_rows=(rows,),
        modules=by_module(norm={"n": NormWeights(torch.zeros(4))}, bias={"m": torch.zeros(3)}),
    )
    assert both.compiled_bytes == 5 * 4 * 4 + 5 * 8 + 4 * 4 + 3 * 4
    kept = both.without_layer_weights()
    assert kept.compiled_bytes == both.compiled_bytes
    assert all(tensor.is_meta for tensor in kept.tensors())
    assert both.primitives == ("replace",)
    assert both.num_modules == 4
    assert replace(both, modules={"n": both.modules["n"]}).num_modules == 3
