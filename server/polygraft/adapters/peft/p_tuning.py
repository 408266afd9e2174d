"""P-tuning (arXiv 2103.10385) as PEFT saves it, compiled to SoftPrompt.

PEFT applies its encoder before it saves the embeddings, and saves no encoder (peft/utils/save_and_load.py).
"""

from __future__ import annotations

from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.prompt_kind import SoftPromptKind


class PTuning(SoftPromptKind):
    """Embeddings before the prompt's, which an encoder made."""

    peft_type = "P_TUNING"
    title = "P-tuning"
    paper = "2103.10385"
    rows = (side_path("run through the base once, then a prefix", "attention to the virtual tokens"),)
    training_only = (
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    )  # fmt: skip
