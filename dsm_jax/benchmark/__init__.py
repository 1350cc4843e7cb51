"""Time steps of the published models on this machine, with random weights: `dsm-jax bench`."""
