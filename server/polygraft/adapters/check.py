"""Checks a folder against a base model without a server."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from polygraft.adapters.compiled import CompiledAdapter
from polygraft.adapters.kinds import AdapterLimits, compile_adapter, run_to_end
from polygraft.adapters.limits import adapter_limits
from polygraft.adapters.primitives import LowRank
from polygraft.adapters.store import read_folder
from polygraft.base.loader import compute_dtype, inspect_without_weights
from polygraft.base.spec import BaseSpec
from polygraft.config import ServerConfig
from polygraft.errors import AdapterInvalid, InvalidRequest


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a folder holds and whether it can be served on a base.

    Args:
        fits: whether it would load.
        ranks: how many modules and experts' parameters have each rank.
        merged_only: whether it would be served on a merged copy alone.
        share_of_base: parameters relative to the base's.
        problems: why it doesn't fit; empty if it does.
    """

    folder: str
    fits: bool
    base_parameters: int
    kind: str = ""
    primitives: tuple[str, ...] = ()
    modules: int = 0
    rank: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    virtual_tokens: int = 0
    parameters: int = 0
    share_of_base: float = 0.0
    disk_bytes: int = 0
    compiled_bytes: int = 0
    merged_only: bool = False
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check_folder(folder: Path, config: ServerConfig) -> CheckReport:
    """Check an adapter's folder as a server with these settings would; no weights of the base are read.

    Raises:
        BaseModelError: the base can't be found or isn't served.
    """
    base = inspect_without_weights(config.model)
    dtype = compute_dtype(config.model, config.dtype, config.device)
    return check_against(folder, base, adapter_limits(config, dtype), dtype)


def check_against(
    folder: Path, base: BaseSpec, limits: AdapterLimits, dtype: torch.dtype = torch.float32
) -> CheckReport:
    """Check an adapter's folder against a base's spec; `dtype` is what the base computes in."""
    name = Path(os.path.abspath(folder)).name
    try:
        files = read_folder(name, folder, limits.compiled_bytes)
        compiled = run_to_end(compile_adapter(files, base, limits))
    except (AdapterInvalid, InvalidRequest) as error:
        problems = error.problems if isinstance(error, AdapterInvalid) else (str(error),)
        return CheckReport(str(folder), False, base.parameters, problems=problems)
    ranks = Counter(compiled.ranks)
    return CheckReport(
        folder=str(folder),
        fits=True,
        base_parameters=base.parameters,
        kind=compiled.kind,
        primitives=compiled.primitives,
        modules=compiled.modules or (len(base.attention) if compiled.prefix else 0),
        rank=compiled.rank,
        ranks=dict(sorted(ranks.items())),
        virtual_tokens=compiled.virtual_tokens,
        parameters=compiled.parameters,
        share_of_base=compiled.parameters / base.parameters,
        disk_bytes=files.disk_bytes,
        compiled_bytes=_with_weights(compiled, base, dtype).compiled_bytes,
        merged_only=compiled.merged_only,
        warnings=compiled.warnings,
    )


def _with_weights(compiled: CompiledAdapter, base: BaseSpec, dtype: torch.dtype) -> CompiledAdapter:
    """The shapes that it has when a load has completed it with the base's weights."""
    compiled = compiled.without_layer_weights()

    def own(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = base.linears[name]
        weight = torch.empty(shape.out_features, shape.in_features, device="meta")
        return weight, weight[:, 0] if shape.has_bias else None

    low_rank: dict[str, LowRank] = {}
    for name, primitive in compiled.low_rank.items():
        weight, bias = own(name)
        if primitive.through_base:
            primitive = replace(primitive, b=(weight @ primitive.b.float()).to(primitive.a.dtype))
        if primitive.of_base is not None:
            primitive = primitive.of_base.completed(primitive, weight, bias)
        if primitive.magnitude is not None:  # it becomes a scale, which is float32 whatever B is kept in
            primitive = replace(primitive, magnitude=primitive.magnitude.float())
        low_rank[name] = primitive
    dense = {name: change.completed(*own(name)) for name, change in compiled.dense.items()}
    # Rows that take the place of the base's lie in its type; how many of them differ, only its weights tell.
    rows = tuple(replace(rows, weight=rows.weight.to(dtype)) for rows in compiled.token_rows)
    return replace(compiled, low_rank=low_rank, dense=dense, token_rows=rows)
