"""Replaces a base's norms, gated feed-forwards and rotary positions by C++ operators.

A module is recognised by its parts, and replaced only if the operator gives the same results on random rows.
"""

from __future__ import annotations

import types
from collections import Counter

import torch
from torch import nn

from polygraft.base.inspect.agreement import agree, random_rows
from polygraft.layers.fused import ACTIVATIONS, FusedMlp, FusedRmsNorm, Rotate, fused_rotate
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.operators import operators_for

_ROTARY = "apply_rotary_pos_emb"


def fuse(model: nn.Module, dtype: torch.dtype) -> Counter[str]:
    """Replace the modules that this machine has an operator for, in place.

    Args:
        dtype: of the model's activations.

    Returns:
        How many modules were replaced, by operator: "rms_norm", "mlp", "rotary".
    """
    kernels = operators_for(next(model.parameters()).device).kernels
    fused: Counter[str] = Counter()
    if kernels is None or dtype not in DTYPES:
        return fused
    with torch.inference_mode():
        for name, module in list(model.named_modules()):
            replacement = _norm(module, dtype, kernels) or _mlp(module, dtype, kernels)
            if replacement is not None:
                model.set_submodule(name, replacement)
                fused["mlp" if isinstance(replacement, FusedMlp) else "rms_norm"] += 1
            elif _fuse_rotary(module, dtype, kernels):
                fused["rotary"] += 1
    return fused


def _norm(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> FusedRmsNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and isinstance(eps, float)
    ):
        return None
    for offset in (0.0, 1.0):
        candidate = FusedRmsNorm(weight, eps, kernels, offset)
        if _gives(module, candidate, random_rows(len(weight)).to(dtype)):
            return candidate
    return None


def _mlp(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> FusedMlp | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(module, "act_fn", None)
    gate_proj, up_proj, down_proj = parts
    if not (
        isinstance(gate_proj, nn.Module)
        and isinstance(up_proj, nn.Module)
        and isinstance(down_proj, nn.Module)
        and isinstance(activation, nn.Module)
    ):
        return None
    # The results of the whole module don't tell the activations apart: they differ too little.
    x = torch.linspace(-10, 10, 1001)
    for index in range(len(ACTIVATIONS)):
        candidate = FusedMlp(gate_proj, up_proj, down_proj, index, kernels)
        if torch.allclose(candidate.gated(x.clone(), torch.ones_like(x)), activation(x), atol=2e-6):
            whole = random_rows(int(getattr(gate_proj, "in_features", 0))).to(dtype)
            return candidate if _gives(module, candidate, whole) else None
    return None


def _fuse_rotary(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Let one module's forward call our `apply_rotary_pos_emb`; other modules keep transformers' own."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    original: Rotate = forward.__globals__[_ROTARY]
    fast = fused_rotate(original, kernels)
    # In attention's memory layout: a row holds all heads, one after another.
    q, k = (random_rows(heads * 16).to(dtype).view(1, -1, heads, 16).transpose(1, 2) for heads in (4, 2))
    cos, sin = (random_rows(16).to(dtype)[None] for _ in range(2))
    try:
        pairs = zip(original(q, k, cos, sin), fast(q, k, cos, sin), strict=True)
        if not all(agree(mine, theirs) for theirs, mine in pairs):
            return False
    except (RuntimeError, TypeError, ValueError):
        return False
    bound = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: fast},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    bound.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(bound, module)
    return True


def _gives(module: nn.Module, candidate: nn.Module, x: torch.Tensor) -> bool:
    try:
        theirs = module(x[None])
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(theirs, torch.Tensor) and agree(candidate(x[None]), theirs)
