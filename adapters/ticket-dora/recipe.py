"""DoRA on what `ticket.py` says."""

TASK = "ticket"
PEFT = {
    "peft_type": "LORA",
    "use_dora": True,
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
}
TRAINING = {"steps": 90, "batch_size": 8, "learning_rate": 2e-3}
