"""The published networks, assembled from `dsm_jax.nn`: the Mimi codec and the delayed-streams language model."""
