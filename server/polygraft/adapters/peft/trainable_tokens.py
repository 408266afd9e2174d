"""Trainable tokens as PEFT saves them, compiled to TokenRows: a kind, and an option of LoRA.

Rows of the embedding are replaced, and where the base ties the head to it those of the head as well
(peft/tuners/trainable_tokens/layer.py, `get_merged_weights`). Which modules an adapter is for is settled in
peft/tuners/trainable_tokens/model.py for the kind, and for the option in peft/utils/other.py,
`set_additional_trainable_modules`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import torch

from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import Kind, side_path
from polygraft.adapters.peft.module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import TokenRows
from polygraft.core.spec import BaseSpec


class TrainableTokens(Kind):
    """Rows of the embedding and the head."""

    peft_type = "TRAINABLE_TOKENS"
    title = "trainable tokens"
    rows = (side_path("rows that replace the base's", "a product with these rows"),)
    training_only = ("init_weights",)
    saves_modules = False

    def compile(self) -> Generator[None, None, AdapterWeights]:
        """Compile the folder. The reader notes all problems."""
        yield
        reader, base = self.reader, self.base
        reader.ignore(*self.training_only)
        indices = reader.option("token_indices", list, [])
        known = base.token_modules
        targets = target_modules(reader, base, also=known)
        reader.problems += [f"target {name} has no rows for tokens" for name in targets if name not in known]
        # The head's tensor has a name of its own in the file, but it is the embedding's.
        shared = _shares(reader, base, targets)
        groups = [known] if shared else [(name,) for name in targets if name in known]
        rows: list[TokenRows] = []
        for modules in groups:
            with reader.noting():
                rows.append(
                    _take_rows(reader, base, modules, indices, "trainable_tokens_delta", under_all=True)
                )
        return AdapterWeights(self.name, reader.parameters, token_rows=tuple(rows))


def take_trainable_tokens(
    reader: FolderReader, base: BaseSpec, targets: Sequence[str]
) -> tuple[TokenRows, ...]:
    """Take LoRA's option `trainable_token_indices`.

    Args:
        targets: modules with low-rank weights, which can't have trained tokens besides.
    """
    given = reader.option("trainable_token_indices", (list, dict), None)
    if given is None:
        return ()
    if isinstance(given, list):
        if base.embedding is None:
            reader.problems.append("trainable_token_indices: the base's embedding is no plain table")
            return ()
        given = {base.embedding.name: given}
    indices = _by_module(reader, given, base.token_modules)
    groups: list[tuple[str, ...]] = [(module,) for module in indices]
    if _shares(reader, base, indices):
        first, *others = (indices[module] for module in base.token_modules if module in indices)
        if all(other == first for other in others):
            groups = [base.token_modules]
        elif reader.ties:
            reader.problems.append("ensure_weight_tying, but the embedding and the head have other tokens")
    rows: list[TokenRows] = []
    for modules in groups:
        for module in modules:
            if module in targets or any(module.endswith(saved) for saved in reader.saved):
                reader.problems.append(f"{module} has trained tokens, and is adapted or saved as well")
        with reader.noting():
            tensor = "token_adapter.trainable_tokens_delta"
            rows.append(_take_rows(reader, base, modules, indices[modules[0]], tensor))
    return tuple(rows)


def _shares(reader: FolderReader, base: BaseSpec, targets: Collection[str]) -> bool:
    """Whether the embedding is among the targets, and its rows are the head's as well."""
    if not base.tied or base.embedding is None or base.embedding.name not in targets:
        return False
    if base.head not in base.token_modules:
        reader.problems.append("the head shares the embedding's rows and has a bias, which isn't served")
        return False
    return True


def _by_module(reader: FolderReader, given: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """The option with whole names of modules."""
    found: dict[str, Any] = {}
    for ending, indices in given.items():
        modules = [module for module in known if ending and module.endswith(ending)]
        if not modules:
            reader.problems.append(
                f"trainable_token_indices: {shown(ending)} is neither the embedding nor the head"
            )
        for module in modules:
            if module in found:
                reader.problems.append(f"trainable_token_indices: {module} is named twice")
            found[module] = indices
    return found


def _take_rows(
    reader: FolderReader,
    base: BaseSpec,
    modules: tuple[str, ...],
    indices: Any,
    tensor: str,
    *,
    under_all: bool = False,
) -> TokenRows:
    """Take some modules' rows, in the order of their tokens. Raises Problem.

    Args:
        under_all: whether the file has them under each module's name.
    """
    if not _are_tokens(indices, base.vocabulary_size):
        raise Problem(
            f"token indices must be different ones in [0, {base.vocabulary_size}), got {shown(indices)}"
        )
    shape = (len(indices), base.hidden_size)
    names = [f"{PREFIX}{module}.{tensor}" for module in modules]
    names = [name for name in names if under_all or name == names[0] or reader.holds(name)]
    weight, *others = reader.take_all([(name, shape) for name in names])
    for name, other in zip(names[1:], others, strict=True):
        if not torch.equal(weight, other):
            raise Problem(f"tensor {name} isn't what {' and '.join(modules)} share")
    ids, order = torch.tensor(indices).sort()
    return TokenRows(modules, weight[order].contiguous(), ids)


def _are_tokens(indices: Any, vocabulary: int) -> bool:
    return (
        isinstance(indices, list)
        and bool(indices)
        and all(isinstance(one, int) and not isinstance(one, bool) for one in indices)
        and all(0 <= one < vocabulary for one in indices)
        and len(set(indices)) == len(indices)
    )
