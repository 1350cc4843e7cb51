"""Train models: pure steps, resumable runs, data, losses and fine-tuning. Needs the `train` extra."""
