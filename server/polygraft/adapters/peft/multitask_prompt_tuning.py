"""Multitask prompt tuning (arXiv 2303.02861) as PEFT saves it, compiled to SoftPrompt.

A task's prompt is the shared one times, element by element, the product of the task's two small matrices
(peft/tuners/multitask_prompt_tuning/model.py, MultitaskPromptEmbedding.forward). In PEFT each request names
its task. Here it names an adapter, so a folder holds one task; one with several is refused rather than served
as its first.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.problems import OptionProblem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.prompt_kind import INITIALIZATION, SoftPromptKind
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.core.spec import BaseSpec


class MultitaskPromptTuning(SoftPromptKind):
    """A shared prompt, multiplied element by element by a task's product of low rank."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    title = "multitask prompt tuning"
    paper = "2303.02861"
    rows = (
        side_path(
            "run through the base once, then a prefix; a folder for each task",
            "attention to the virtual tokens",
        ),
    )
    training_only = (*INITIALIZATION, "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._tasks = reader.option("num_tasks", int, 1)
        self._rank = reader.option("num_ranks", int, 1)

    def check(self) -> None:
        """Check the options."""
        super().check()
        require(self._tasks >= 1 and self._rank >= 1, num_tasks=self._tasks, num_ranks=self._rank)
        if self._tasks > 1:
            raise OptionProblem(
                f"it holds {self._tasks} tasks, and an adapter is one; make a folder for each task t, with "
                "prefix_task_cols[t:t+1], prefix_task_rows[t:t+1] and num_tasks=1"
            )

    def virtual_tokens(self) -> Generator[None, None, Prefix | SoftPrompt]:
        """Return the task's prompt. Raises Problem."""
        hidden = self.base.hidden_size
        shared, columns, rows = self.reader.take_all(
            [
                ("prompt_embeddings", (self.tokens, hidden)),
                ("prefix_task_cols", (self._tasks, self.tokens, self._rank)),
                ("prefix_task_rows", (self._tasks, self._rank, hidden)),
            ],
            wide=True,
        )
        return SoftPrompt(self.reader.keep(shared * (columns[0] @ rows[0]), "the prompt"))
        yield
