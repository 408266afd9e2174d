"""Prompt tuning (arXiv 2104.08691) as PEFT saves it, compiled to SoftPrompt."""

from __future__ import annotations

from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.prompt_kind import INITIALIZATION, SoftPromptKind


class PromptTuning(SoftPromptKind):
    """Embeddings before the prompt's."""

    peft_type = "PROMPT_TUNING"
    title = "prompt tuning"
    paper = "2104.08691"
    rows = (side_path("run through the base once, then a prefix", "attention to the virtual tokens"),)
    training_only = INITIALIZATION
