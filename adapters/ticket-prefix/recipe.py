"""Prefix tuning on what `ticket.py` says."""

from ticket import INSTRUCTION

TASK = "ticket"
PEFT = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 24}
INIT_TEXT = INSTRUCTION
TRAINING = {"steps": 90, "batch_size": 8, "learning_rate": 1e-2}
