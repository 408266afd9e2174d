"""What depends on the base's weights in an adapter, resolved against them once, when it is loaded.

DoRA (arXiv 2402.09353) brings each row of W + B A to a norm that it has learnt; PEFT computes
`m / ||W + B A|| * (W x + B A x) + bias` (peft/tuners/lora/dora.py, DoraLinearLayer.forward), B A with its
scaling. The factor doesn't depend on x, so it is a scale of the sum.

HRA (arXiv 2405.17484) turns W into W - (W P) U^T (`adapters/peft/hra.py`), so its B is a product with W.
Other kinds derive classes from `OfBase` in their own files.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch

from polygraft.core.adapter_weights import AdapterWeights, ModuleChange
from polygraft.core.primitives import Scale
from polygraft.layers.linear.low_rank_bank import LowRankBank
from polygraft.layers.linear.merging import AnyLinearSite


def resolve_against_base(
    compiled: AdapterWeights, bank: LowRankBank
) -> Generator[None, None, AdapterWeights]:
    """An adapter that needs the base no more and does the same; yields between modules.

    The base's weights are taken as they are served: on a quantized base, what they stand for. PEFT's own
    norms are wrong on an nf4 base whose weights the CPU kernel has packed.
    """
    modules = dict(compiled.modules)
    for name, change in compiled.modules.items():
        if change.needs_base:
            yield
            modules[name] = _resolved(change, bank.site(name))
    return replace(compiled, modules=modules)


def _resolved(change: ModuleChange, site: AnyLinearSite) -> ModuleChange:
    """Complete one module's change with the module's weight."""
    weight = site.weight().float()
    bias = site.slots.base_bias if change.bias is None else change.bias.float()
    if change.dense is not None:
        return replace(change, dense=change.dense.completed(weight.cpu(), bias))
    primitive = change.low_rank
    assert primitive is not None
    device = primitive.b.device
    if primitive.of_base is not None:
        completed = primitive.of_base.completed(primitive, weight.to(device), bias)
        return replace(change, low_rank=completed)
    if primitive.through_base:
        b = (weight @ primitive.b.to(weight)).to(device, primitive.a.dtype)
        primitive = replace(primitive, b=b, through_base=False)
    if primitive.magnitude is None:
        return replace(change, low_rank=primitive)
    weight = weight + primitive.product.to(weight.device)
    factor = primitive.magnitude.float().to(weight.device) / torch.linalg.norm(weight, dim=1)
    scale = Scale(output=factor, of_sum=True)
    return replace(change, low_rank=replace(primitive, magnitude=None), scale=scale)
