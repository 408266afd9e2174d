"""Context-aware prompt tuning (CPT, arXiv 2410.17222) as PEFT saves it, compiled to SoftPrompt.

Training moves the embeddings of a few examples within a bound; what is saved is the sum, projected into it
(peft/tuners/cpt/model.py, CPTEmbedding.forward). A loaded adapter uses it as it is (peft/peft_model.py,
get_prompt): masks, bounds and the loss's weights belong to training.
"""

from __future__ import annotations

from polygraft.adapters.files.problems import OptionProblem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.prompt_kind import SoftPromptKind
from polygraft.core.spec import BaseSpec


class Cpt(SoftPromptKind):
    """Embeddings of examples before the prompt's."""

    peft_type = "CPT"
    title = "CPT"
    paper = "2410.17222"
    rows = (side_path("run through the base once, then a prefix", "attention to the virtual tokens"),)
    training_only = (
        "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
        "opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path",
    )  # fmt: skip

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._examples = reader.option("cpt_token_ids", list, [0])

    def check(self) -> None:
        """Check the number of tokens: PEFT counts the examples' and passes over num_virtual_tokens."""
        super().check()
        if len(self._examples) != self.tokens:
            raise OptionProblem(
                f"num_virtual_tokens is {self.tokens}, cpt_token_ids has {len(self._examples)}"
            )
