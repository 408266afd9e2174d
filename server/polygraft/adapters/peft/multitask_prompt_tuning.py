"""Multitask prompt tuning (arXiv 2303.02861) as PEFT saves it, compiled to SoftPrompt.

A task's prompt is the shared one times, element by element, the product of the task's two small matrices
(peft/tuners/multitask_prompt_tuning/model.py, MultitaskPromptEmbedding.forward). In PEFT each request names
its task. Here it names an adapter, so a folder holds one task; one with several is refused rather than served
as its first.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.soft_prompt import ignore_initialization, take_embeddings
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import SoftPrompt
from polygraft.core.spec import BaseSpec


def compile_multitask_prompt_tuning(
    reader: FolderReader, base: BaseSpec
) -> Generator[None, None, AdapterWeights]:
    """Compile a multitask prompt of one task. Problems are noted in the reader."""
    yield
    tokens, shared = take_embeddings(reader, base, wide=True)
    tasks = reader.option("num_tasks", int, 1)
    rank = reader.option("num_ranks", int, 1)
    ignore_initialization(reader)
    reader.ignore("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
    if tasks < 1 or rank < 1:
        reader.problems.append(f"num_tasks {tasks} with num_ranks {rank} makes no sense")
    elif tasks > 1:
        reader.problems.append(
            f"it holds {tasks} tasks, and an adapter is one; make a folder for each task t, with "
            "prefix_task_cols[t:t+1], prefix_task_rows[t:t+1] and num_tasks=1"
        )
    columns = reader.take("prefix_task_cols", (tasks, tokens, rank), wide=True)
    rows = reader.take("prefix_task_rows", (tasks, rank, base.hidden_size), wide=True)
    prompt = None
    if shared is not None and columns is not None and rows is not None and not reader.problems:
        embeddings = reader.keep(shared * (columns[0] @ rows[0]), "the prompt")
        prompt = None if embeddings is None else SoftPrompt(embeddings)
    return AdapterWeights("multitask_prompt_tuning", reader.parameters, prefix=prompt)
