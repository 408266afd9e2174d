"""DoRA's magnitudes, resolved against the base's weights once, when an adapter is loaded.

DoRA (arXiv 2402.09353) brings each row of W + B A to a norm that it has learnt; PEFT computes
`m / ||W + B A|| * (W x + B A x) + bias` (peft/tuners/lora/dora.py, DoraLinearLayer.forward). The factor
doesn't depend on x, so it is a scale of the base's product, and is folded into B.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch

from polygraft.adapters.primitives import CompiledAdapter, LowRank, Scale
from polygraft.layers.low_rank_bank import LowRankBank


def resolve_magnitudes(
    compiled: CompiledAdapter, bank: LowRankBank
) -> Generator[None, None, CompiledAdapter]:
    """An adapter without magnitudes that does the same; yields between modules.

    The norms are of the base's weights as they are served: on a quantized base, of what they stand for.
    PEFT's own are wrong on an nf4 base whose weights the CPU kernel has packed.
    """
    if all(primitive.magnitude is None for primitive in compiled.low_rank.values()):
        return compiled
    low_rank: dict[str, LowRank] = {}
    scales = dict(compiled.scales)
    for name, primitive in compiled.low_rank.items():
        low_rank[name] = primitive
        if primitive.magnitude is None:
            continue
        yield
        weight = bank.site(name).weight().float()
        weight = weight + (primitive.b.float() @ primitive.a.float()).to(weight.device)
        factor = primitive.magnitude.float().to(weight.device) / torch.linalg.norm(weight, dim=1)
        b = (primitive.b.float() * factor[:, None].to(primitive.b.device)).to(primitive.b.dtype)
        low_rank[name] = LowRank(primitive.a, b, primitive.bias)
        scales[name] = Scale(output=factor)
    return replace(compiled, low_rank=low_rank, scales=scales)
