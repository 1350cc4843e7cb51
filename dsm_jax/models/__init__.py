"""The published networks, built from `dsm_jax.nn`: the Mimi codec and the delayed-streams language model."""
