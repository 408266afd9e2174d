"""LoRA's `target_parameters`: low-rank weights for experts, compiled to ExpertLowRank, and for routers.

PEFT adds `scaling * B_e A_e` to the weight of each expert e (peft/tuners/lora/layer.py, ParamWrapper,
get_delta_weight). In its file lora_A is [experts * rank, inputs], the ranks of one expert behind each other;
lora_B is [outputs, rank * experts], the experts of one rank behind each other. Which dimension of the base's
parameter counts the inputs, its module says. Parameters of one module nest: the one that comes last in the
module is the outermost, and each before it lies one `base_layer` deeper (peft/tuners/tuners_utils.py,
_inject_parameters). A router's weight is a matrix, and its A and B are as any module's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from polygraft.adapters.files.patterns import endings
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.peft.module import PREFIX
from polygraft.adapters.peft.per_module import RankAndAlpha, paired, scaling_of
from polygraft.base.inspect.routers import WEIGHT
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import ExpertLowRank, LowRank
from polygraft.core.spec import BaseSpec

_GATE = "gate.weight"
"""What PEFT makes of "all-linear" for many architectures, those whose router has another name among them
(peft/utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING); there it passes over it."""


class TargetParameters:
    """Takes the option and its tensors.

    PEFT applies none of `exclude_modules`, `layers_to_transform` and `modules_to_save` to these parameters.

    Args:
        settings: ranks and alphas, by the parameter's name.
        rslora: whether scalings are rank-stabilized.
    """

    def __init__(self, reader: FolderReader, base: BaseSpec, settings: RankAndAlpha, *, rslora: bool) -> None:
        self._reader = reader
        self._base = base
        self._settings = settings
        self._rslora = rslora
        self.experts: dict[str, ExpertLowRank] = {}
        """The experts' matrices by the name of the parameter, once they have been taken."""
        targets = reader.option("target_parameters", list, [])
        self.given = bool(targets)
        """Whether the folder has the option."""
        names = [f"{module}.{weight}" for module, shape in base.experts.items() for weight in shape.weights]
        names += [f"{module}.{WEIGHT}" for module in base.routers]
        self._note_unknown(targets, names)
        wanted = {target for target in targets if isinstance(target, str)}
        self._targets = {name for name in names if not wanted.isdisjoint(endings(name))}

    def _note_unknown(self, targets: list[object], names: list[str]) -> None:
        """Note targets that aren't served."""
        without_gate = not any(
            "gate" in endings(module) for module in (*self._base.linears, *self._base.others)
        )
        known = {ending for name in names for ending in endings(name)}
        none = "" if names else ", and this base has none that are known"
        for target in targets:
            passed_over = target == _GATE and without_gate
            if not passed_over and (not isinstance(target, str) or target not in known):
                self._reader.problems.append(
                    f"target_parameters: {shown(target)} is no weight of experts or of a router, and others "
                    f"aren't served{none}"
                )

    def refuse_with(self, **used: bool) -> None:
        """Note the options that PEFT's ParamWrapper refuses, or can't run with.

        Args:
            used: whether such an option, which has been taken, is in use.
        """
        keys = [key for key, is_used in used.items() if is_used]
        for key, expected in (("lora_dropout", (int, float)), ("fan_in_fan_out", bool)):
            if self._reader.option(key, expected, False):
                keys.append(key)
        self._reader.problems += [f"{key} with target_parameters has no meaning in PEFT" for key in keys]

    def take(self) -> Generator[None, None, Mapping[str, ModuleChange]]:
        """Take the experts' matrices, and return the routers' ones; yields between them.

        Raises:
            OptionProblem: a pattern can't be matched.
        """
        for module, shape in self._base.experts.items():
            adapted = [weight for weight in shape.weights if f"{module}.{weight}" in self._targets]
            for depth, weight in enumerate(reversed(adapted)):
                yield
                name, prefix = f"{module}.{weight}", PREFIX + module + ".base_layer" * depth
                with self._reader.noting(prefix, inner=True):
                    widths = shape.weights[weight]
                    self.experts[name] = self._take_pair(name, prefix, shape.experts, widths)
        routers: dict[str, ModuleChange] = {}
        for module, router in self._base.routers.items():
            name, prefix = f"{module}.{WEIGHT}", PREFIX + module
            if name in self._targets:
                yield
                with self._reader.noting(prefix, inner=True):
                    pair = self._take_pair(name, prefix, 1, (router.in_features, router.out_features))
                    low_rank = LowRank(pair.a[0], pair.b[0], scaling=pair.scaling)
                    routers[module] = ModuleChange(low_rank)
        return routers

    def _take_pair(self, name: str, prefix: str, experts: int, widths: tuple[int, int]) -> ExpertLowRank:
        """Take one parameter's matrices. Raises Problem.

        Args:
            prefix: of the tensors' names.
            widths: inputs and outputs.
        """
        rank, alpha = self._settings.of(name)
        inputs, outputs = widths
        a, b = self._reader.take_all(
            [
                (f"{prefix}.lora_A.weight", (experts * rank, inputs)),
                (f"{prefix}.lora_B.weight", (outputs, rank * experts)),
            ]
        )
        a = a.reshape(experts, rank, inputs)
        b = b.reshape(outputs, rank, experts).permute(2, 0, 1)
        scaling = scaling_of(rank, alpha, rslora=self._rslora)
        return ExpertLowRank(*paired(name, a, b, scaling), scaling)
