"""LayerNorm tuning (arXiv 2312.11420) as PEFT saves it, compiled to NormWeights.

A copy of each targeted module was trained and takes its place (peft/tuners/ln_tuning/layer.py).
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.kind import Kind, side_path
from polygraft.adapters.peft.module import PREFIX
from polygraft.adapters.peft.saved_modules import take_norm
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, ModuleChange


class LnTuning(Kind):
    """Norms that replace the base's."""

    peft_type = "LN_TUNING"
    title = "LN tuning"
    paper = "2312.11420"
    rows = (side_path("norms that replace the base's", "nothing"),)

    def compile(self) -> Generator[None, None, AdapterWeights]:
        """Compile the folder; yields between modules. The reader notes all problems."""
        changes: dict[str, ModuleChange] = {}
        for module in target_modules(self.reader, self.base, also=self.base.norms):
            yield
            if module not in self.base.norms:
                self.reader.problems.append(f"target {module} is no norm, which this kind is served on alone")
                continue
            prefix = f"{PREFIX}{module}.ln_tuning_layers"
            with self.reader.noting():
                changes[module] = ModuleChange(norm=take_norm(self.reader, self.base, module, prefix))
        return AdapterWeights(self.name, self.reader.parameters, changes)
