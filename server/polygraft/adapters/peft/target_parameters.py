"""LoRA's `target_parameters`: low-rank weights for experts, compiled to ExpertLowRank, and for routers.

PEFT adds `scaling * B_e A_e` to the weight of each expert e (peft/tuners/lora/layer.py, ParamWrapper,
get_delta_weight). In its file lora_A is [experts * rank, inputs], the ranks of one expert behind each other;
lora_B is [outputs, rank * experts], the experts of one rank behind each other. Which dimension of the base's
parameter counts the inputs, its module says. Parameters of one module nest: the one that comes last in the
module is the outermost, and each before it lies one `base_layer` deeper (peft/tuners/tuners_utils.py,
_inject_parameters). A router's weight is a matrix, and its A and B are as any module's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from polygraft.adapters.files.patterns import endings
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX, ModuleSettings, scaling_of
from polygraft.adapters.peft.targets import BAD_PATTERN
from polygraft.base.inspect.routers import WEIGHT
from polygraft.core.primitives import ExpertLowRank, LowRank
from polygraft.core.spec import BaseSpec

_GATE = "gate.weight"
"""What PEFT makes of "all-linear" for many architectures, those whose router has another name among them
(peft/utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING); there it passes over it."""


def target_parameters(reader: FolderReader, base: BaseSpec) -> list[str] | None:
    """Take the option and return the targeted parameters, noting targets that can't be served; None without
    the option.

    PEFT applies none of `exclude_modules`, `layers_to_transform` and `modules_to_save` to them.
    """
    targets = reader.option("target_parameters", list, [])
    if not targets:
        return None
    names = [f"{module}.{weight}" for module, shape in base.experts.items() for weight in shape.weights]
    names += [f"{module}.{WEIGHT}" for module in base.routers]
    without_gate = not any("gate" in endings(module) for module in (*base.linears, *base.others))
    known = {ending for name in names for ending in endings(name)}
    wanted = {target for target in targets if isinstance(target, str)}
    for target in targets:
        if target == _GATE and without_gate:
            continue
        if not isinstance(target, str) or target not in known:
            none = "" if names else ", and this base has none that are known"
            reader.problems.append(
                f"target_parameters: {shown(target)} is no weight of experts or of a router, and others "
                f"aren't served{none}"
            )
    return [name for name in names if not wanted.isdisjoint(endings(name))]


def refuse_with_parameters(reader: FolderReader, used: Sequence[str]) -> None:
    """Refuse what PEFT's ParamWrapper refuses, or can't run with.

    Args:
        used: such options that have been taken and are in use.
    """
    used = list(used)
    for key, expected in (("lora_dropout", (int, float)), ("fan_in_fan_out", bool)):
        if reader.option(key, expected, False):
            used.append(key)
    reader.problems += [f"{key} with target_parameters has no meaning in PEFT" for key in used]


def take_parameters(
    reader: FolderReader, base: BaseSpec, targets: Sequence[str], settings: ModuleSettings, *, rslora: bool
) -> Generator[None, None, tuple[dict[str, ExpertLowRank], dict[str, LowRank]]]:
    """Take the weights of the targeted parameters: experts' by the name of the parameter, routers' by that of
    the module; yields between them."""
    experts: dict[str, ExpertLowRank] = {}
    routers: dict[str, LowRank] = {}
    try:
        for module, shape in base.experts.items():
            adapted = [weight for weight in shape.weights if f"{module}.{weight}" in targets]
            for depth, weight in enumerate(reversed(adapted)):
                yield
                name, prefix = f"{module}.{weight}", PREFIX + module + ".base_layer" * depth
                widths = shape.weights[weight]
                pair = _take_pair(reader, settings, name, prefix, shape.experts, widths, rslora=rslora)
                if pair is not None:
                    experts[name] = pair
        for module, router in base.routers.items():
            name = f"{module}.{WEIGHT}"
            if name in targets:
                yield
                widths = router.in_features, router.out_features
                pair = _take_pair(reader, settings, name, PREFIX + module, 1, widths, rslora=rslora)
                if pair is not None:
                    routers[module] = LowRank(pair.a[0], pair.b[0], scaling=pair.scaling)
    except BAD_PATTERN as error:
        settings.note_bad_pattern(error)
    return experts, routers


def _take_pair(
    reader: FolderReader,
    settings: ModuleSettings,
    name: str,
    prefix: str,
    experts: int,
    widths: tuple[int, int],
    *,
    rslora: bool,
) -> ExpertLowRank | None:
    """What one parameter has; None after noting what is wrong. Raises: one of `BAD_PATTERN`.

    Args:
        name: the parameter's.
        prefix: of the tensors' names.
        widths: inputs and outputs.
    """
    rank_and_alpha = settings.of(name)
    if rank_and_alpha is None:
        return None
    rank, alpha = rank_and_alpha
    inputs, outputs = widths
    a = reader.take(f"{prefix}.lora_A.weight", (experts * rank, inputs))
    b = reader.take(f"{prefix}.lora_B.weight", (outputs, rank * experts))
    if a is None or b is None:
        return None
    a = a.reshape(experts, rank, inputs)
    b = b.reshape(outputs, rank, experts).permute(2, 0, 1)
    scaling = scaling_of(rank, alpha, rslora=rslora)
    pair = settings.paired(name, a, b, scaling)
    return None if pair is None else ExpertLowRank(*pair, scaling)
