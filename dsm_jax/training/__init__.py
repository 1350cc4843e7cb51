"""Training: pure train steps, their state and data, and the recipe of the embedded model. Needs the `train` extra."""
