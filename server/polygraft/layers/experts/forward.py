"""The product of a module with several experts, with room for what adapters add to each expert's.

What it computes is transformers' own (transformers/integrations/moe.py, `grouped_mm_experts_forward`), by the
same grouped products: for a row x, the sum over its experts e of `weight_e * down_e(act(up_e(x)))`. There
nothing can be added between a product and what follows it. What adapters add is PEFT's (ParamWrapper in
peft/tuners/lora/layer.py): B_e A_e to an expert's weight, so B_e A_e times what it reads to its product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polygraft.layers.experts.pairs import ExpertPairs

if TYPE_CHECKING:
    from polygraft.layers.experts.low_rank import ExpertSlots

DOWN = "down_proj"


def up_name(experts: Any) -> str:
    """Name of the parameter that reads a layer's rows."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def experts_forward(
    experts: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    pairs: ExpertPairs,
    slots: Mapping[str, ExpertSlots] | None = None,
) -> torch.Tensor:
    """x [rows, hidden_size] to the same.

    Args:
        experts: a module as `base/inspect/experts.py` finds them.
        weights: [rows, several], of the experts that each row goes to.
        slots: by the name of the parameter, adapters' weights; None for the base alone.
    """
    slots = slots or {}
    out = _product(experts, up_name(experts), x[pairs.rows], pairs, slots)
    out = experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
    out = _product(experts, DOWN, out, pairs, slots)
    if getattr(experts, "has_post_expert_norm", False):  # unknown to transformers 5.17
        out = experts.post_expert_norm(out)
    out = out * weights.reshape(-1)[pairs.order, None]
    by_row = torch.empty_like(out)
    by_row[pairs.order] = out
    return by_row.view(len(x), pairs.several, -1).sum(1).to(x.dtype)


def _product(
    experts: Any, name: str, x: torch.Tensor, pairs: ExpertPairs, slots: Mapping[str, ExpertSlots]
) -> torch.Tensor:
    """Each pair's expert times x [pairs, in_features]."""
    weight: torch.Tensor = getattr(experts, name)
    by = weight if experts.is_transposed else weight.transpose(1, 2)
    x = x.to(weight.dtype)
    out = nn.functional.grouped_mm(x, by, offs=pairs.ends)
    if experts.has_bias:
        out = out + getattr(experts, f"{name}_bias")[pairs.experts]
    if name in slots:
        slots[name].add(x, out, pairs)
    return out
