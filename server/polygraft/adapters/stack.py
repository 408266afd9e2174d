"""The adapters of one request: their order and weights, and which of them have a meaning together.

On a module of the base they act in the order of the request, each on what those before it have left, as
PEFT's layers do for `set_adapter([...])` (peft/tuners/lora/layer.py, Linear.forward; tuners/ia3/layer.py):
with factors s, low-rank weights A, B or a Kronecker product in their place, and bias c, an adapter of weight
w makes `s * out + w * (B A x + c)` of `out`. So LoRAs add up, and are what `add_weighted_adapter(...,
combination_type="cat")` makes of them; factors multiply what stands before them, and nothing behind them. A
rotation turns what the base's weights read, and nothing else. Virtual tokens stand before the prompt
wherever their adapter is named; those of a soft prompt run through the base with all the others in force.
"""

from __future__ import annotations

from collections.abc import Sequence

from polygraft.adapters.registry import Adapter
from polygraft.core.adapter_weights import AdapterWeights, ModuleChange
from polygraft.core.names import STACK, STACK_KIND
from polygraft.errors import InvalidRequest
from polygraft_types.requests import CombinationType

Runs = tuple[tuple[int, float], ...]
"""Slot in the bank and weight of each adapter that has side paths, in the order in which they act."""

# What a stack knows how to combine. Anything else may be in one if no other adapter is.
_COMBINED = {
    "low_rank", "expert_low_rank", "kron", "scale", "rotation", "bottleneck", "coupling", "prefix",
    "soft_prompt",
}  # fmt: skip
_ADDED = {"low_rank", "expert_low_rank", "kron"}
"""What a weight is a factor on."""


class Stack:
    """Adapters that act together, in this order; without any it is the base model.

    Args:
        members: adapters and their weights.
        combination_type: what they are together.
    """

    def __init__(
        self,
        members: Sequence[tuple[Adapter, float]] = (),
        combination_type: CombinationType = CombinationType.STACK,
    ) -> None:
        self.members = tuple(members)
        self.adapters = tuple(adapter for adapter, _ in members)
        self.combines = combination_type is CombinationType.LINEAR and len(members) > 0
        """Whether weights that are made of all of theirs act in their place."""
        self.runs: Runs = tuple((adapter.slot, weight) for adapter, weight in members if adapter.slot)
        self.key = (self.combines, *((adapter.generation, weight) for adapter, weight in members))
        """What nothing else has that acts otherwise: generations, with their weights, in their order."""
        self.prefix = next((adapter for adapter in self.adapters if adapter.compiled.prefix), None)
        """The one that has virtual tokens."""
        alone = len(members) == 1 and members[0][1] == 1.0 and not self.combines
        self.only = self.adapters[0] if alone else None
        """The adapter, if it is alone and as it is: others can't be merged."""

    @classmethod
    def of(cls, adapter: Adapter | None) -> Stack:
        """One adapter as it is, or the base."""
        return cls() if adapter is None else cls([(adapter, 1.0)])

    def pin(self) -> None:
        """One more sequence holds them all."""
        for adapter in self.adapters:
            adapter.pin()

    def release(self) -> None:
        """One sequence less."""
        for adapter in self.adapters:
            adapter.release()

    def acts_from(self, prompt: Sequence[int]) -> int | None:
        """The first of a prompt's tokens that they act on; None if they don't, for want of an invocation."""
        invocation = self.adapters[0].compiled.invocation if self.adapters else ()
        if not invocation:
            return 0
        several = len(invocation)
        starts = range(len(prompt) - several, -1, -1)
        return next((at for at in starts if tuple(prompt[at : at + several]) == invocation), None)

    @property
    def virtual_tokens(self) -> int:
        """Keys that they add to the context."""
        return 0 if self.prefix is None else self.prefix.compiled.virtual_tokens

    @property
    def generations(self) -> tuple[int, ...]:
        """Of its adapters, in their order."""
        return tuple(adapter.generation for adapter in self.adapters)

    @property
    def label(self) -> str:
        """What metrics call it: the adapter's name, `STACK` for several, "" for the base."""
        return STACK if len(self.adapters) > 1 else "".join(adapter.name for adapter in self.adapters)

    @property
    def kind(self) -> str:
        """Its kind in metrics: the adapter's, `STACK_KIND` for several, "" for the base."""
        if len(self.adapters) > 1:
            return STACK_KIND
        return "".join(adapter.compiled.kind for adapter in self.adapters)


BASE = Stack()


def check_stack(members: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse weights and combinations that have no defined meaning.

    Raises:
        InvalidRequest: names the element of `adapters`, and says why.
    """
    for at, (adapter, weight) in enumerate(members):
        if weight != 1.0 and not _ADDED.issuperset(adapter.compiled.primitives):
            raise InvalidRequest(
                f"adapters[{at}].weight",
                f"must be 1 for {adapter.name!r}: a weight is a factor on weights that are added to the "
                f"base's, and {adapter.compiled.kind} has {' and '.join(adapter.compiled.primitives)}",
            )
    for at, (adapter, _) in enumerate(members):
        for before, _ in members[:at]:
            if before.name == adapter.name:
                raise InvalidRequest(f"adapters[{at}].name", f"{adapter.name!r} is named twice")
            problem = _conflict(before.compiled, adapter.compiled)
            if problem:
                raise InvalidRequest(f"adapters[{at}]", f"{adapter.name!r} after {before.name!r}: {problem}")


def _conflict(before: AdapterWeights, after: AdapterWeights) -> str | None:
    """Why the second can't act behind the first; None if it can."""
    if before.merged_only or after.merged_only:
        only = before if before.merged_only else after
        return f"{only.kind} is served merged only, and a merged copy has one adapter's weights in it"
    unknown = {*before.primitives, *after.primitives} - _COMBINED - {before.of_base, after.of_base}
    if unknown:
        return f"what {sorted(unknown)[0]} means beside another adapter isn't defined"
    if before.invocation or after.invocation:
        return "an activated LoRA begins inside a prompt, and others beside it aren't defined"
    if before.prefix and after.prefix:
        return "both have virtual tokens, and these are trained to stand before the prompt alone"
    if before.coupling and after.coupling:
        return "both are invertible adapters around all layers, and one inside another isn't defined"
    sites = before.bottlenecks.keys() & after.bottlenecks.keys()
    if sites:
        return f"both have a bottleneck at {min(sites)}, and which of them reads the other's isn't defined"
    both = sorted(before.modules.keys() & after.modules.keys())
    problems = (_conflict_on(module, before, after) for module in both)
    return next((problem for problem in problems if problem), None)


def _conflict_on(module: str, before: AdapterWeights, after: AdapterWeights) -> str | None:
    """Why the second can't act behind the first on one module; None if it can."""
    first, second = before.modules[module], after.modules[module]
    magnitudes = _has_magnitude(before, first), _has_magnitude(after, second)
    if all(magnitudes):
        return (
            f"both are DoRA on {module}, and each one's magnitude is a norm of the base's weights with its "
            "own change alone"
        )
    late = None
    if second.scale is not None and second.scale.input is not None:
        late = "scales"
    elif second.rotation is not None:
        late = "rotates"
    if late and (first.low_rank is not None or first.kron is not None):
        return (
            f"it {late} the input of {module}, which the weights that are added before it would have to read "
            "as well; name it first"
        )
    if after.of_base and second.low_rank is not None:
        return (
            f"it makes a {after.of_base} of the base's weights of {module}, not of what the adapter before "
            "it makes of them; name it first"
        )
    if before.of_base and first.low_rank is not None and magnitudes[1]:
        return f"its magnitude on {module} is a norm of the base's weights, not of a {before.of_base}"
    # PEFT rotates by the first OFT first, and defines no order for anything else.
    in_order = before.rotations_in_order and before.kind == after.kind
    if (first.rotation and (second.scale or (second.rotation and not in_order))) or (
        second.rotation and first.scale
    ):
        return f"which of them comes first on {module}, where one rotates the inputs, isn't defined"
    return None


def _has_magnitude(compiled: AdapterWeights, change: ModuleChange) -> bool:
    """Whether an adapter brings a module's rows to norms that it has learnt."""
    if compiled.of_base:  # GLoRA's scales are factors on the base's weights, and no norms
        return False
    return change.low_rank is not None and change.scale is not None and change.scale.output is not None
