"""P-tuning on what `ticket.py` says."""

from ticket import INSTRUCTION

TASK = "ticket"
PEFT = {"peft_type": "P_TUNING", "num_virtual_tokens": 24, "encoder_hidden_size": 128}
# What the encoder gives before training.
INIT_TEXT = INSTRUCTION
TRAINING = {"steps": 90, "batch_size": 8, "learning_rate": 3e-3}
