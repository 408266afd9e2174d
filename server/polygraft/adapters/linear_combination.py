"""Several LoRAs as one, whose A and B are the weighted sums of theirs: what PEFT's `add_weighted_adapter`
makes with `combination_type="linear"`.

With f = sqrt(|w s|) for an adapter of weight w whose scaling on a module is s, A is the sum of sign(w s) f
A_i and B that of f B_i (peft/tuners/lora/model.py, `_generalized_task_arithmetic_weighted_adapter`): B A has
each one's B times every other's A in it. The result has the target_modules of all and the other options of
the first adapter, so it may be on other modules than the adapters are, and one that begins with an rsLoRA is
scaled by the root of its rank once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import torch

from polygraft.core.adapter_weights import AdapterWeights, LoraSettings, by_module
from polygraft.core.primitives import LowRank
from polygraft.errors import InvalidRequest

if TYPE_CHECKING:
    from polygraft.adapters.registry import Adapter

Members = Sequence[tuple["Adapter", float]]
"""Adapters and their weights."""


def check_linear(members: Members) -> None:
    """Refuse adapters of which PEFT makes no linear combination, or one that leaves parts of them out.

    Raises:
        InvalidRequest: names the element of `adapters`, and says why.
    """
    first = members[0][0]
    settings: list[LoraSettings] = []
    ranks: dict[str, tuple[int, str]] = {}
    for at, (adapter, _) in enumerate(members):
        field, lora = f"adapters[{at}]", adapter.compiled.lora
        problem = _not_plain(adapter.compiled)
        if lora is None or problem:
            raise InvalidRequest(field, f"{adapter.name!r} can't be in a LINEAR combination: {problem}")
        if any(before.name == adapter.name for before, _ in members[:at]):
            raise InvalidRequest(f"{field}.name", f"{adapter.name!r} is named twice")
        settings.append(lora)
        problem = _unlike(settings[0], lora)
        if problem:
            raise InvalidRequest(field, f"{adapter.name!r} after {first.name!r}: {problem}")
        for module, matrices in _matrices(adapter.compiled).items():
            rank, before = ranks.setdefault(module, (matrices.rank, adapter.name))
            if rank != matrices.rank:
                problem = (
                    f"only equal ranks can be added up, theirs on {module} are {rank} and {matrices.rank}"
                )
                raise InvalidRequest(field, f"{adapter.name!r} after {before!r}: {problem}")
    _check_targets(first, settings)


def _not_plain(compiled: AdapterWeights) -> str | None:
    """Why there is no linear combination with an adapter; None for a plain LoRA."""
    if compiled.lora is None:
        return f"{compiled.kind} is no LoRA of PEFT's"
    if compiled.has("scale"):
        return "DoRA's magnitude is a norm of the base's weights with its own change alone"
    if compiled.invocation:
        return "an activated LoRA begins inside a prompt, and what others do there isn't defined"
    if compiled.lora.has_parameters:
        return "PEFT doesn't combine target_parameters"
    if compiled.lora.tied:
        return "PEFT's combinations leave the head out that its embedding is tied to"
    if any(primitive.bias is not None for primitive in compiled.each("low_rank").values()):
        return "PEFT's combinations have no lora_bias"
    if compiled.replaces:
        return "PEFT's combinations have the base's own tokens, norms and biases"
    return None


def _unlike(one: LoraSettings, other: LoraSettings) -> str | None:
    """Why PEFT doesn't combine two of these settings; None if it does."""
    if one.targets.by_pattern != other.targets.by_pattern:
        return "PEFT combines target_modules that are lists, or regular expressions, and not both"
    if one.rank != other.rank:
        return f"only equal ranks can be added up, their r is {one.rank} and {other.rank}"
    return None


def _check_targets(first: Adapter, settings: Sequence[LoraSettings]) -> None:
    """Raise InvalidRequest where PEFT's combination is on other modules than the adapters are."""
    all_of_them = frozenset[str]().union(*(one.scalings for one in settings))
    combined = frozenset[str]().union(*(one.targets.named for one in settings))
    kept = settings[0].targets.kept
    if kept is not None:
        combined &= kept
    if combined != all_of_them:
        lost = sorted(all_of_them - combined)
        what = f"leaves {lost[0]} out" if lost else f"has no weights for {min(combined - all_of_them)}"
        raise InvalidRequest(
            "adapters",
            "PEFT's LINEAR combination has the first one's exclude_modules and layers_to_transform, and with "
            f"those of {first.name!r} it {what}",
        )


def combined_bytes(members: Members, dtype: torch.dtype) -> int:
    """Memory that the combination's matrices take in this type."""
    sizes: dict[str, int] = {}
    for adapter, _ in members:
        for module, matrices in _matrices(adapter.compiled).items():
            numbers = matrices.a.numel() + matrices.b.numel()
            sizes[module] = max(sizes.get(module, 0), numbers * dtype.itemsize)
    return sum(sizes.values())


def combine(
    members: Members, read: Callable[[Adapter, str], LowRank], dtype: torch.dtype
) -> Generator[None, None, AdapterWeights]:
    """The combination of adapters that `check_linear` lets pass; yields between modules.

    Args:
        read: returns an adapter's matrices for a module; the scaling comes from its settings.
        dtype: of the result; sums are computed in float32.

    Raises:
        InvalidRequest: the sums aren't finite.
    """
    found = [(adapter, adapter.compiled.lora, weight) for adapter, weight in members]
    loras = [(adapter, lora, weight) for adapter, lora, weight in found if lora is not None]
    first = loras[0][1]
    overall = math.sqrt(first.rank) if first.rslora else 1.0
    combined: dict[str, LowRank] = {}
    for name in dict.fromkeys(name for _, lora, _ in loras for name in lora.scalings):
        yield
        terms = [
            (read(adapter, name), *_factors(weight * lora.scalings[name]))
            for adapter, lora, weight in loras
            if name in lora.scalings
        ]
        a = functools.reduce(torch.add, (factor * matrices.a.float() for matrices, factor, _ in terms))
        b = functools.reduce(torch.add, (factor * matrices.b.float() for matrices, _, factor in terms))
        both = LowRank(a.to(dtype), b.to(dtype), scaling=overall)
        if not (both.a.isfinite().all() and (overall * both.b).isfinite().all()):
            raise InvalidRequest("adapters", f"their LINEAR combination isn't finite on {name}")
        combined[name] = both
    table = next((lora.embedding for _, lora, _ in loras if lora.embedding is not None), "")
    embedding = combined.pop(table, None)
    return AdapterWeights("lora", 0, by_module(low_rank=combined), embedding=embedding)


def _factors(product: float) -> tuple[float, float]:
    """The factors on A and B for a weight times a scaling."""
    factor = math.sqrt(abs(product))
    return math.copysign(factor, product), factor


def _matrices(compiled: AdapterWeights) -> dict[str, LowRank]:
    """Those of all modules, the embedding's under its name."""
    lora = compiled.lora
    if lora is None or lora.embedding is None or compiled.embedding is None:
        return compiled.each("low_rank")
    return {**compiled.each("low_rank"), lora.embedding: compiled.embedding}
