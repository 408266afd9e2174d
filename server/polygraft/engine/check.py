"""Checks a folder against a base model without a server, by the rules that a server's loads go by."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from polygraft.adapters.compile import run_to_end
from polygraft.adapters.files.store import read_folder
from polygraft.adapters.limits import AdapterLimits, adapter_limits
from polygraft.base.context_limit import context_limit
from polygraft.base.default_model import fetched_default_model
from polygraft.base.loader import base_config, inspect_without_weights
from polygraft.base.model_folder import DEFAULT, locate
from polygraft.base.tokenizer import TextTokenizer, load_tokenizer
from polygraft.base.weights import compute_dtype
from polygraft.config import ServerConfig
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.engine.loading.adapter_rules import AdapterRules, Room
from polygraft.engine.prompts.adapter_prompts import AdapterPrompts
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
        unchecked: what only a server can tell, which may still refuse it.
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
    unchecked: tuple[str, ...] = ()


def check_folder(folder: Path, config: ServerConfig) -> CheckReport:
    """Check an adapter's folder as a server with these settings would; no weights of the base are read.

    Raises:
        BaseModelError: the base can't be found or isn't served.
    """
    base = inspect_without_weights(config.model)
    base_settings = base_config(config.model)
    dtype = compute_dtype(base_settings, config.dtype, config.device)
    limit, _ = context_limit(base_settings)
    merged = config.merged_bytes if config.quantization == "none" else None
    room = Room(min(limit, config.max_context_length or limit), config.block_size, None, merged)
    return check_against(
        folder, base, adapter_limits(config, dtype), dtype, room, local_tokenizer(config.model)
    )


def check_against(
    folder: Path,
    base: BaseSpec,
    limits: AdapterLimits,
    dtype: torch.dtype = torch.float32,
    room: Room | None = None,
    tokenizer: TextTokenizer | None = None,
) -> CheckReport:
    """Check an adapter's folder against a base's spec.

    Args:
        dtype: what the base computes in.
        room: None for a context of any length.
        tokenizer: the base's, if it is at hand.
    """
    name = Path(os.path.abspath(folder)).name
    room = room or Room(2**31, 16)
    read = None
    if tokenizer is not None:
        read = AdapterPrompts(_Texts(tokenizer, base, room.context_length)).reading
    rules = AdapterRules(base, limits, room, read)
    try:
        files = read_folder(name, folder, limits.compiled_bytes)
        examined = run_to_end(rules.examine(files))
        rules.check_copy(name, examined.compiled, _least_copy(examined.compiled, base, dtype))
    except (AdapterInvalid, InvalidRequest) as error:
        problems = error.problems if isinstance(error, AdapterInvalid) else (str(error),)
        return CheckReport(str(folder), False, base.parameters, problems=problems)
    compiled = examined.compiled
    ranks = Counter(compiled.ranks)
    return CheckReport(
        folder=str(folder),
        fits=True,
        base_parameters=base.parameters,
        kind=compiled.kind,
        primitives=compiled.primitives,
        modules=examined.modules,
        rank=compiled.rank,
        ranks=dict(sorted(ranks.items())),
        virtual_tokens=compiled.virtual_tokens,
        parameters=compiled.parameters,
        share_of_base=compiled.parameters / base.parameters,
        disk_bytes=files.disk_bytes,
        compiled_bytes=_with_weights(compiled, base, dtype).compiled_bytes,
        merged_only=compiled.merged_only,
        warnings=examined.warnings,
        unchecked=rules.unchecked(files, compiled),
    )


def _least_copy(compiled: AdapterWeights, base: BaseSpec, dtype: torch.dtype) -> int:
    """Bytes that a merged copy takes at least, where the base isn't quantized."""
    changed = {*compiled.each("low_rank"), *compiled.each("dense")} & base.linears.keys()
    shapes = [base.linears[name] for name in changed]
    return sum(shape.in_features * shape.out_features for shape in shapes) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Texts:
    """What reading an adapter's tokenizer and template needs of the base. Its own ends are of no account."""

    tokenizer: TextTokenizer
    spec: BaseSpec
    context_length: int
    eos_token_ids: tuple[int, ...] = ()


def local_tokenizer(model: str) -> TextTokenizer | None:
    """A base's tokenizer if it is on this machine: nothing is fetched to check an adapter."""
    folder = locate(model) if model != DEFAULT else fetched_default_model()
    if folder is None or not Path(folder).is_dir():
        return None
    try:
        return load_tokenizer(str(folder))
    except (OSError, ValueError):
        return None


def _with_weights(compiled: AdapterWeights, base: BaseSpec, dtype: torch.dtype) -> AdapterWeights:
    """The shapes that it has when a load has completed it with the base's weights."""
    compiled = compiled.without_layer_weights()

    def own(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = base.linears[name]
        weight = torch.empty(shape.out_features, shape.in_features, device="meta")
        return weight, weight[:, 0] if shape.has_bias else None

    modules = dict(compiled.modules)
    for name, change in compiled.modules.items():
        if not change.needs_base:
            continue
        weight, bias = own(name)
        bias = bias if change.bias is None else change.bias.float()
        if change.dense is not None:
            change = replace(change, dense=change.dense.completed(weight, bias))
        if change.low_rank is not None:
            primitive = change.low_rank
            if primitive.through_base:
                primitive = replace(primitive, b=(weight @ primitive.b.float()).to(primitive.a.dtype))
            if primitive.of_base is not None:
                primitive = primitive.of_base.completed(primitive, weight, bias)
            if primitive.magnitude is not None:  # it becomes a scale, which is float32 whatever B is kept in
                primitive = replace(primitive, magnitude=primitive.magnitude.float())
            change = replace(change, low_rank=primitive)
        modules[name] = change
    # Rows that take the place of the base's lie in its type; how many of them differ, only its weights tell.
    rows = tuple(replace(rows, weight=rows.weight.to(dtype)) for rows in compiled.token_rows)
    return replace(compiled, modules=modules, token_rows=rows)
