"""(IA)³ on what `ticket.py` says."""

TASK = "ticket"
PEFT = {
    "peft_type": "IA3",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}
TRAINING = {"steps": 60, "batch_size": 8, "learning_rate": 2e-2}
