"""(IA)^3 (arXiv 2205.05638) as PEFT saves it, compiled to Scale.

A vector multiplies a module's output, its bias included, or, of the modules that `feedforward_modules` names,
its input (peft/tuners/ia3/layer.py, Linear.forward). Which of the two a module gets is decided by the end of
its name, as in peft/tuners/ia3/model.py, `_check_target_module_feedforward`.
"""

from __future__ import annotations

from collections.abc import Sequence

from polygraft.adapters.files.patterns import BadPattern, Form
from polygraft.adapters.files.problems import OptionProblem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import not_matched
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Scale
from polygraft.core.spec import BaseSpec


class Ia3(ModuleKind):
    """Factors on inputs or outputs."""

    peft_type = "IA3"
    title = "(IA)³"
    paper = "2205.05638"
    rows = (side_path("scales of inputs or outputs", "a product for each of them"),)
    training_only = ("init_ia3_weights", "fan_in_fan_out")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._feedforward: str | list[str] = reader.option("feedforward_modules", (str, list), [])

    def begin(self, targets: Sequence[str]) -> None:
        """Check the option."""
        names = self._feedforward
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            raise OptionProblem(f"feedforward_modules must hold names: {shown(names)}")

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the scale of the inputs of a feed-forward module, of the outputs of another."""
        if self._is_feedforward(module.name):
            vector = module.take("ia3_l", (1, module.inputs), wide=False).float().flatten()
            return ModuleChange(scale=Scale(input=vector))
        vector = module.take("ia3_l", (module.outputs, 1), wide=False).float().flatten()
        return ModuleChange(scale=Scale(output=vector, after_bias=True))

    def _is_feedforward(self, module: str) -> bool:
        if not isinstance(self._feedforward, str):
            return any(module.endswith(name) for name in self._feedforward)
        try:
            return self.reader.matching.match(Form.WHOLE, self._feedforward, module) is not None
        except BadPattern as error:
            raise not_matched("feedforward_modules", error) from None
