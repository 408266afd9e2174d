"""Prefix tuning (arXiv 2101.00190) as AdapterHub saves it, compiled to Prefix.

Either the keys and values themselves (`flat`), or embeddings and the two layers that project them, which are
applied here once. Both give [tokens, layers * 2 * kv_heads * head_dim] over the layers that aren't left out:
row 2i of the reshaped table is the i-th such layer's keys, 2i + 1 its values
(adapters/methods/prefix_tuning.py). Keys are put before a request's own after those have been rotated, real
tokens start at position 0, and every row sees them.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import nn

from polygraft.adapters.adapterhub.layers import Layer
from polygraft.adapters.adapterhub.non_linearity import PRELU, take_non_linearity, take_slope
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.source import Parts, Source
from polygraft.adapters.files.problems import Problem, all_of
from polygraft.core.primitives import Prefix
from polygraft.layers.residual.activations import ACTIVATIONS

# Prefixes of encoders and of cross-attention, which are for encoder-decoder models.
_NO_EFFECT = ("encoder_prefix", "cross_prefix", "dropout", "init_weights_seed", "shared_gating")


def compile_prefix(source: Source, options: Options) -> Generator[None, None, Parts]:
    """Compile a prefix; yields between layers. Raises Problem."""
    options.ignore(*_NO_EFFECT)
    tokens = options.take("prefix_length", int, 30)
    left_out = options.layers_left_out()
    with_prefix = [layer for layer in source.layers.layers if layer.index not in left_out]
    site = next(iter(source.base.attention.values()))
    _check(source, options, tokens, with_prefix)
    columns = len(with_prefix) * 2 * site.kv_heads * site.head_dim
    rows = _take_rows(source, options, with_prefix, tokens, columns)
    table = rows.view(tokens, len(with_prefix), 2, site.kv_heads, site.head_dim)
    keys, values, nothing = [], [], table[:0, 0, 0]
    row_of = {layer.index: row for row, layer in enumerate(with_prefix)}
    for layer in source.layers.layers:
        yield
        row = row_of.get(layer.index)
        keys.append(nothing if row is None else table[:, row, 0].contiguous())
        values.append(nothing if row is None else table[:, row, 1].contiguous())
    return Parts("prefix_tuning", prefix=Prefix(tuple(keys), tuple(values), start=0))


def _check(source: Source, options: Options, tokens: int, with_prefix: list[Layer]) -> None:
    """Raise Problem if the base, or the options, can't have such a prefix."""
    sites = source.base.attention.values()
    shapes = {(site.kv_heads, site.head_dim, site.value_dim) for site in sites}
    if len(shapes) > 1 or any(head_dim != value_dim for _, head_dim, value_dim in shapes):
        raise Problem("the base's layers have keys and values of different shapes")
    if any(site.window for site in sites):
        raise Problem("the base has sliding windows, and in AdapterHub every row sees the whole prefix")
    if tokens < 1:
        raise options.problem("prefix_length", tokens, "must be at least 1")
    if not with_prefix:
        raise Problem("leave_out leaves no layer of the base")


def _take_rows(
    source: Source, options: Options, layers: list[Layer], tokens: int, columns: int
) -> torch.Tensor:
    """Return the projected result, [tokens, columns] or as many numbers. Raises Problem."""
    reader = source.reader
    hidden = source.base.hidden_size
    activation = take_non_linearity(source, options, "tanh")
    width = options.take("bottleneck_size", int, 512)
    is_flat = options.flag("flat")

    def names(suffix: str) -> list[str]:
        # Every layer's attention holds the same pool of prefixes, so a file may have copies.
        pool = f"prefix_tunings.{source.name}.self_prefix.{suffix}"
        copies = [f"{layer.attention}.prefix_tuning.pool.{pool}" for layer in source.layers.layers]
        return [source.layers.shared(f"prefix_tuning.{pool}"), *copies]

    # `eject_prefix_tuning` flattens the tensors and leaves the configuration as it was.
    if is_flat or any(reader.holds(name) for name in names("control_trans")):
        return source.take_any(names("control_trans"), (tokens * columns,))
    embeddings, down, down_bias, up, up_bias = all_of(
        lambda: source.take_any(names("wte.weight"), (tokens, hidden), wide=True),
        lambda: source.take_any(names("control_trans.0.weight"), (width, hidden), wide=True),
        lambda: source.take_any(names("control_trans.0.bias"), (width,), wide=True),
        lambda: source.take_any(names("control_trans.2.weight"), (columns, width), wide=True),
        lambda: source.take_any(names("control_trans.2.bias"), (columns,), wide=True),
    )
    reader.need_room(0, tokens * columns)
    inner = nn.functional.linear(embeddings, down, down_bias)
    if activation == PRELU:
        modules = [name.removesuffix(".f.weight") for name in names("control_trans.1.f.weight")]
        inner = nn.functional.leaky_relu(inner, take_slope(source, *modules))
    else:
        inner = ACTIVATIONS[activation](inner)
    return reader.keep(nn.functional.linear(inner, up, up_bias), "the prefix")
