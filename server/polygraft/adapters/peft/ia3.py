"""(IA)^3 (arXiv 2205.05638) as PEFT saves it, compiled to Scale.

A vector multiplies a module's output, its bias included, or, of the modules that `feedforward_modules` names,
its input (peft/tuners/ia3/layer.py, Linear.forward). Which of the two a module gets is decided by the end of
its name, as in peft/tuners/ia3/model.py, `_check_target_module_feedforward`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from polygraft.adapters.files.patterns import Form, Matching
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Scale
from polygraft.core.spec import BaseSpec

_PREFIX = "base_model.model."


def compile_ia3(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile an (IA)^3 folder; yields between modules. Problems are noted in the reader."""
    feedforward = reader.option("feedforward_modules", (str, list), [])
    if isinstance(feedforward, list) and not all(isinstance(name, str) for name in feedforward):
        reader.problems.append(f"feedforward_modules must hold names: {shown(feedforward)}")
        feedforward = []
    reader.ignore("init_ia3_weights", "fan_in_fan_out")
    scales: dict[str, Scale] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        try:
            of_input = _is_feedforward(reader.matching, module, feedforward)
        except BAD_PATTERN as error:
            reader.problems.append(
                f"feedforward_modules is not a regular expression that can be matched: {error}"
            )
            break
        size = (1, shape.in_features) if of_input else (shape.out_features, 1)
        vector = reader.take(f"{_PREFIX}{module}.ia3_l", size)
        if vector is None:
            continue
        vector = vector.float().flatten()
        scales[module] = Scale(input=vector) if of_input else Scale(output=vector, after_bias=True)
    return AdapterWeights("ia3", reader.parameters, by_module(scale=scales))


def _is_feedforward(matching: Matching, module: str, feedforward: str | Sequence[str]) -> bool:
    """Raises one of `BAD_PATTERN`."""
    if isinstance(feedforward, str):
        return matching.match(Form.WHOLE, feedforward, module) is not None
    return any(module.endswith(name) for name in feedforward)
