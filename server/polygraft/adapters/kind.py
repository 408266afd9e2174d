"""The declaration of an adapter kind: one class, in the kind's own file.

An instance compiles one folder into primitives. The class says everything else that the server, the
documents and the tests have to know about the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import ClassVar

from polygraft.adapters.files.reader import FolderReader
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Row:
    """How a kind, or a variant of it, is served: a row of the documents' table.

    Args:
        runs_as: what the engine runs.
        cost: what it costs in a step.
        where: the variant, in the configuration's terms; empty for all of the kind.
        merged_only: it is served on merged copies alone.
    """

    runs_as: str
    cost: str
    where: str = ""
    merged_only: bool = False


def side_path(runs_as: str = "low-rank side path", cost: str = "rank × rows", *, where: str = "") -> Row:
    """Return a row for what shares its steps with all other adapters."""
    return Row(runs_as, cost, where)


def merged_copy(change: str, *, where: str = "") -> Row:
    """Return a row for what is folded into merged copies and runs nowhere else."""
    return Row(f"{change}, folded into a merged copy", "steps of its own, memory of a copy", where, True)


class Kind(ABC):
    """Compiles one folder of a kind.

    Class attributes:
        peft_type: PEFT's name.
        title: the name in the documents.
        paper: arXiv's number, or "" for a kind without a paper.
        rows: how it is served.
        training_only: options that only training reads.
        unserved: options of PEFT's that change what it computes, and that aren't served.
        prefix: what PEFT puts before the names of the base's modules in the kind's files.
        targets_modules: whether it has `target_modules`.
        saves_modules: whether it has `modules_to_save`.
        ties: whether it has `ensure_weight_tying`.

    Args:
        reader: the folder's.
        base: with as many tokens as the folder has rows for.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    rows: ClassVar[tuple[Row, ...]]
    training_only: ClassVar[Collection[str]] = ()
    unserved: ClassVar[Collection[str]] = ()
    prefix: ClassVar[str] = "base_model.model."
    targets_modules: ClassVar[bool] = True
    saves_modules: ClassVar[bool] = True
    ties: ClassVar[bool] = False

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        self.reader = reader
        self.base = base

    @property
    def name(self) -> str:
        """The kind as the API and metrics call it."""
        return self.peft_type.lower()

    @abstractmethod
    def compile(self) -> Generator[None, None, AdapterWeights]:
        """Compile the folder; yields where it may be interrupted. The reader notes all problems."""
