"""Prompt tuning on what `ticket.py` says."""

from ticket import INSTRUCTION

TASK = "ticket"
PEFT = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 24,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": INSTRUCTION,
}
TRAINING = {"steps": 120, "batch_size": 8, "learning_rate": 3e-2}
