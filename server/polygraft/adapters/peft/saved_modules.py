"""Whole modules in an adapter's folder, compiled to TokenRows and NormWeights.

`modules_to_save` names modules that were trained themselves, by the ends of their names (peft/utils/other.py,
`_set_trainable` and ModulesToSaveWrapper). Beside that PEFT saves copies of the base's embedding and head
where one of them is adapted, or where they were given rows for more tokens (peft/utils/save_and_load.py,
"DEAL WITH EMBEDDINGS"). In PEFT a copy takes the place of the base's own weights when it is loaded; here it
must be equal to them for all tokens that the base knows, so what is left of it are the rows of added tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import Kind
from polygraft.adapters.peft.targets import EMBEDDING_NAMES
from polygraft.core.adapter_weights import AdapterWeights, by_module, joined
from polygraft.core.primitives import NormWeights, TokenRows
from polygraft.core.spec import BaseSpec

_COPIES = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
"""What PEFT calls the base's own weight: of a bare module, beneath a tuner's, beneath trainable tokens."""


@dataclass(frozen=True, slots=True)
class SavedModules:
    """What a folder holds of whole modules.

    Args:
        base: the base with as many tokens as the folder has rows for.
    """

    base: BaseSpec
    token_rows: tuple[TokenRows, ...] = ()
    norms: dict[str, NormWeights] = field(default_factory=dict)

    def added_to(self, compiled: AdapterWeights, vocabulary: int) -> AdapterWeights:
        """An adapter with these.

        Args:
            vocabulary: the base's own.
        """
        own = self.base.vocabulary_size
        return replace(
            compiled,
            token_rows=self.token_rows + compiled.token_rows,
            modules=joined(by_module(norm=self.norms), compiled.modules),
            vocabulary=None if own == vocabulary else own,
        )


def take_saved_modules(reader: FolderReader, base: BaseSpec, kind: type[Kind]) -> SavedModules:
    """Take whole modules, noting what can't be served. Before the kind's own compiler, which needs `base`."""
    prefix = kind.prefix
    reader.ties = kind.ties and reader.option("ensure_weight_tying", bool, False) and base.tied
    saved = _named_modules(reader, base) if kind.saves_modules else []
    sizes = {
        shape[0]
        for module in base.token_modules
        for copy in _COPIES
        if (shape := reader.shape(f"{prefix}{module}.{copy}")) and len(shape) == 2
    }
    sizes.discard(base.vocabulary_size)
    if sizes:
        base = _resized(reader, base, sizes)
    rows: list[TokenRows] = []
    norms: dict[str, NormWeights] = {}
    for module in saved:
        with reader.noting():
            if module in base.token_modules:
                rows.append(TokenRows((module,), _take_saved(reader, base, f"{prefix}{module}")))
            elif module in base.norms:
                norms[module] = take_norm(reader, base, module, f"{prefix}{module}")
            else:
                what = base.others.get(module, "linear module")
                raise Problem(
                    f"modules_to_save has {module}, a {what}: only the embedding, the head and norms are "
                    "served"
                )
    rows += _take_copies(reader, base, prefix, saved)
    rows = _shared(reader, rows)
    covered = {module for one in rows for module in one.modules}
    if sizes:
        reader.problems += [
            f"it has {base.vocabulary_size} tokens, but no rows of {module} for them"
            for module in base.token_modules
            if module not in covered
        ]
    return SavedModules(base, tuple(rows), norms)


def take_norm(reader: FolderReader, base: BaseSpec, module: str, prefix: str) -> NormWeights:
    """Take a norm's weight, and its bias if it has one. Raises Problem."""
    shape = base.norms[module]
    names = (f"{prefix}.weight", f"{prefix}.bias") if shape.has_bias else (f"{prefix}.weight",)
    return NormWeights(*reader.take_all([(name, (shape.width,)) for name in names]))


def _named_modules(reader: FolderReader, base: BaseSpec) -> list[str]:
    """Take the option; the modules that it names."""
    endings = reader.option("modules_to_save", list, [])
    # As in PEFT, any suffix of a name matches, not only whole components, and the option's order counts.
    order = {ending: at for at, ending in enumerate(endings) if isinstance(ending, str) and ending}
    named: dict[str, list[str]] = {}
    for name in (*base.linears, *base.others):
        for start in range(len(name)):
            if name[start:] in order:
                named.setdefault(name[start:], []).append(name)
    for ending in endings:
        if not isinstance(ending, str) or not ending:
            reader.problems.append(f"modules_to_save must hold names: {shown(ending)}")
        elif ending not in named:
            # As PEFT does: model classes for other tasks have modules that a language model lacks.
            reader.warnings.append(f"modules_to_save: {shown(ending)} matches no module of the base")
    found = [name for ending in sorted(named, key=order.__getitem__) for name in named[ending]]
    reader.saved = tuple(ending for ending in endings if isinstance(ending, str))
    if reader.ties and any(ending.split(".")[-1] in EMBEDDING_NAMES for ending in reader.saved):
        reader.saved += base.token_modules
        found += base.token_modules
    return list(dict.fromkeys(found))


def _resized(reader: FolderReader, base: BaseSpec, sizes: set[int]) -> BaseSpec:
    """The base with as many tokens as the file has rows for."""
    known = base.vocabulary_size
    if len(sizes) > 1:
        reader.problems.append(f"the embedding and the head have rows for {sorted(sizes)} tokens")
    elif len(base.token_modules) < 2 or base.embedding is None or not base.embedding.resizable:
        reader.problems.append(
            f"it has {min(sizes)} tokens, and other than {known} aren't served on this base"
        )
    elif min(sizes) < 1:
        reader.problems.append("it has no tokens")
    else:
        return base.resized(min(sizes))
    return base


def _take_saved(reader: FolderReader, base: BaseSpec, module: str) -> torch.Tensor:
    """Take one module's trained weight. Of a resized base PEFT saves it twice, and what it replaces as well.

    Raises:
        Problem: it is missing, or saved as two different ones.
    """
    shape = (base.vocabulary_size, base.hidden_size)
    again, replaced = f"{module}.modules_to_save.weight", f"{module}.original_module.weight"
    held = [name for name in (again, replaced) if reader.holds(name)]
    weight, *others = reader.take_all([(name, shape) for name in (f"{module}.weight", *held)])
    if again in held and not torch.equal(weight, others[0]):
        raise Problem(f"tensor {again} isn't {module}.weight")
    return weight


def _take_copies(reader: FolderReader, base: BaseSpec, prefix: str, saved: list[str]) -> list[TokenRows]:
    """Take copies of the base's embedding and head that the folder doesn't replace."""
    found: dict[tuple[str, ...], TokenRows] = {}
    shape = (base.vocabulary_size, base.hidden_size)
    own = [module for module in base.token_modules if module not in saved]
    names = [(module, f"{prefix}{module}.{copy}") for module in own for copy in _COPIES]
    for module, name in names:
        if not reader.holds(name):
            continue
        with reader.noting():
            modules = tuple(own) if base.tied else (module,)
            weight = reader.take(name, shape)
            first = found.setdefault(modules, TokenRows(modules, weight, copied=True))
            if not torch.equal(first.weight, weight):
                raise Problem(f"tensor {name} isn't what {' and '.join(modules)} share")
    return list(found.values())


def _shared(reader: FolderReader, rows: list[TokenRows]) -> list[TokenRows]:
    """Rows that the embedding and the head share, kept once."""
    trained = [one for one in rows if not one.copied]
    if len(trained) < 2:
        return rows
    first, second = trained
    if torch.equal(first.weight, second.weight):
        both = TokenRows(first.modules + second.modules, first.weight)
        return [both, *(one for one in rows if one.copied)]
    if reader.ties:
        reader.problems.append("ensure_weight_tying, but the embedding and the head differ")
    return rows
