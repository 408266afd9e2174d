"""A bottleneck adapter (AdapterHub's `seq_bn`) on what `ticket.py` says."""

TASK = "ticket"
BOTTLENECK = {"reduction_factor": 16}
TRAINING = {"steps": 60, "batch_size": 8, "learning_rate": 1e-3}
