"""What kinds with virtual tokens share: their options, and the loop around their tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator

import torch

from polygraft.adapters.files.problems import OptionProblem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import Kind
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.core.spec import BaseSpec

INITIALIZATION = (
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
)  # fmt: skip
"""Options that say how a prompt was initialised."""


class PromptKind(Kind):
    """A kind with virtual tokens, which leaves the base's modules as they are."""

    prefix = "base_model."
    targets_modules = False
    saves_modules = False
    unserved = ("modules_to_save",)

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self.tokens: int = reader.option("num_virtual_tokens", int, 0)
        self._submodules = reader.option("num_transformer_submodules", int, 1)

    def compile(self) -> Generator[None, None, AdapterWeights]:
        """Compile the folder; yields where it may be interrupted. The reader notes all problems."""
        yield
        self.reader.ignore(*self.training_only)
        prefix = None
        with self.reader.noting():
            self.check()
            prefix = yield from self.virtual_tokens()
        return AdapterWeights(self.name, self.reader.parameters, prefix=prefix)

    def check(self) -> None:
        """Raise Problem if an option isn't valid."""
        if self.tokens < 1:
            raise OptionProblem(f"num_virtual_tokens must be at least 1, got {self.tokens}")
        if self._submodules != 1:
            raise OptionProblem("num_transformer_submodules other than 1 is for encoder-decoder models")

    @abstractmethod
    def virtual_tokens(self) -> Generator[None, None, Prefix | SoftPrompt]:
        """Take the tensors; yields where it may be interrupted. Raises Problem."""


class SoftPromptKind(PromptKind):
    """A kind whose virtual tokens are embeddings before the prompt's, at positions 0 to tokens - 1.

    PEFT saves `prompt_embeddings [tokens, hidden]` (peft/utils/save_and_load.py) and puts them before the
    prompt's own (peft/peft_model.py, PeftModelForCausalLM.forward).
    """

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        # The tensor's shape says the same.
        reader.ignore("num_layers", "num_attention_heads", "token_dim")

    def virtual_tokens(self) -> Generator[None, None, Prefix | SoftPrompt]:
        """Take the embeddings. Raises Problem."""
        return SoftPrompt(self.take_embeddings().contiguous())
        yield

    def take_embeddings(self, *, wide: bool = False) -> torch.Tensor:
        """Take the tensor [tokens, hidden], in float32 if `wide`. Raises Problem."""
        return self.reader.take("prompt_embeddings", (self.tokens, self.base.hidden_size), wide=wide)
