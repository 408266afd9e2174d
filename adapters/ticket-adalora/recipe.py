"""AdaLoRA on what `ticket.py` says: from rank 12 to an average of 8."""

TASK = "ticket"
PEFT = {
    "peft_type": "ADALORA",
    "init_r": 12,
    "target_r": 8,
    "tinit": 15,
    "tfinal": 30,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj"],
}
TRAINING = {"steps": 90, "batch_size": 8, "learning_rate": 1e-2}
