"""Context-aware prompt tuning (CPT, arXiv 2410.17222) as PEFT saves it, compiled to SoftPrompt.

Training moves the embeddings of a few examples within a bound; what is saved is the sum, projected into it
(peft/tuners/cpt/model.py, CPTEmbedding.forward). A loaded adapter uses it as it is (peft/peft_model.py,
get_prompt): masks, bounds and the loss's weights belong to training.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.soft_prompt import take_embeddings
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import SoftPrompt
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = (
    "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
    "opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path",
)  # fmt: skip


def compile_cpt(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a CPT folder. Problems are noted in the reader."""
    yield
    tokens, embeddings = take_embeddings(reader, base)
    # PEFT counts these and passes over num_virtual_tokens.
    examples = len(reader.option("cpt_token_ids", list, [0]))
    if examples != tokens:
        reader.problems.append(f"num_virtual_tokens is {tokens}, cpt_token_ids has {examples}")
    reader.ignore(*_TRAINING_ONLY)
    prompt = None if embeddings is None else SoftPrompt(embeddings.contiguous())
    return AdapterWeights("cpt", reader.parameters, prefix=prompt)
