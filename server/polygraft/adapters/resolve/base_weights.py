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

from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import LowRank, Scale
from polygraft.layers.linear.low_rank_bank import LowRankBank


def resolve_against_base(
    compiled: AdapterWeights, bank: LowRankBank
) -> Generator[None, None, AdapterWeights]:
    """An adapter that needs the base no more and does the same; yields between modules.

    The base's weights are taken as they are served: on a quantized base, what they stand for. PEFT's own
    norms are wrong on an nf4 base whose weights the CPU kernel has packed.
    """
    needs_base = [primitive.needs_base for primitive in compiled.low_rank.values()]
    if not any(needs_base + [change.needs_base for change in compiled.dense.values()]):
        return compiled
    low_rank: dict[str, LowRank] = {}
    scales = dict(compiled.scales)
    for name, primitive in compiled.low_rank.items():
        low_rank[name] = primitive
        if not primitive.needs_base:
            continue
        yield
        site = bank.site(name)
        weight = site.weight().float()
        device = primitive.b.device
        if primitive.of_base is not None:
            low_rank[name] = primitive.of_base.completed(primitive, weight.to(device), site.slots.base_bias)
        if primitive.through_base:
            b = (weight @ primitive.b.to(weight)).to(device, primitive.a.dtype)
            low_rank[name] = replace(primitive, b=b, through_base=False)
        if primitive.magnitude is not None:
            weight = weight + primitive.product.to(weight.device)
            factor = primitive.magnitude.float().to(weight.device) / torch.linalg.norm(weight, dim=1)
            low_rank[name] = replace(primitive, magnitude=None)
            scales[name] = Scale(output=factor, of_sum=True)
    dense = dict(compiled.dense)
    for name, change in compiled.dense.items():
        if change.needs_base:
            yield
            site = bank.site(name)
            dense[name] = change.completed(site.weight().float().cpu(), site.slots.base_bias)
    return replace(compiled, low_rank=low_rank, scales=scales, dense=dense)
