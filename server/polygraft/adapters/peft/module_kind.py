"""The loop that kinds share which change linear modules, each by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import ClassVar

from polygraft.adapters.kind import Kind
from polygraft.adapters.peft.module import PREFIX, TargetModule
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, ModuleChange, joined


class ModuleKind(Kind):
    """A kind that changes the linear modules which `target_modules` names.

    It reads its options in `__init__`, checks them in `begin` and compiles a module in `change`. The loop
    owns the targets, the trained biases, and the list of problems.

    Class attributes:
        trains_biases: whether it has the option `bias`.
        of_base, rotations_in_order: as in `AdapterWeights`.
    """

    trains_biases: ClassVar[bool] = False
    of_base: ClassVar[str] = ""
    rotations_in_order: ClassVar[bool] = False

    def compile(self) -> Generator[None, None, AdapterWeights]:
        """Compile the folder; yields between modules. The reader notes all problems."""
        self.reader.ignore(*self.training_only)
        targets = self.targets()
        biases = take_trained_biases(self.reader, self.base, targets) if self.trains_biases else {}
        changes: dict[str, ModuleChange] = {}
        with self.reader.noting(PREFIX):
            self.begin(targets)
            for module in self._modules(targets):
                yield
                with self.reader.noting(module.prefix, inner=True):
                    change = self.change(module)
                    if change is not None:
                        changes[module.name] = change
            changes.update((yield from self.others()))
        return self.weights(joined(changes, biases))

    def targets(self) -> Sequence[str]:
        """Return the modules to compile, in the base's order."""
        return target_modules(self.reader, self.base)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options, and take what all modules share.

        Raises:
            Problem: nothing can be compiled.
        """

    @abstractmethod
    def change(self, module: TargetModule) -> ModuleChange | None:
        """Return what the folder changes about a module; None if that is nothing.

        Raises:
            Problem: a tensor is missing or invalid; the other modules are compiled all the same.
            OptionProblem: the configuration is invalid; no other module is compiled.
        """

    def others(self) -> Generator[None, None, Mapping[str, ModuleChange]]:
        """Return what is compiled when all targets have been; yields between modules. Raises as `change`."""
        return {}
        yield

    def weights(self, modules: Mapping[str, ModuleChange]) -> AdapterWeights:
        """Return the adapter that makes these changes."""
        return AdapterWeights(
            self.name,
            self.reader.parameters,
            modules,
            of_base=self.of_base,
            rotations_in_order=self.rotations_in_order,
        )

    def _modules(self, targets: Sequence[str]) -> Iterator[TargetModule]:
        for place, name in enumerate(targets):
            yield TargetModule(self.reader, name, self.base.linears[name], place)
