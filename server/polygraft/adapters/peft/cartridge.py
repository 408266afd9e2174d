"""Cartridges (arXiv 2506.06266) as PEFT saves them, compiled to Prefix.

A Cartridge is keys and values that were trained as such; PEFT saves and applies them as it does those of
prefix tuning (peft/tuners/cartridge/model.py).
"""

from __future__ import annotations

from polygraft.adapters.peft.prefix_tuning import PrefixTuning


class Cartridge(PrefixTuning):
    """Keys and values before the prompt's, in every layer."""

    peft_type = "CARTRIDGE"
    title = "Cartridges"
    paper = "2506.06266"
    training_only = ("num_frozen_tokens",)
