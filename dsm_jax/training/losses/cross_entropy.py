"""Average cross-entropies over the tokens that count."""

import jax
import jax.numpy as jnp
import optax


def mean_cross_entropy(logits: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Average the cross-entropy over the masked tokens; 0 where the mask is empty.

    Args:
      logits: float32 [..., V].
      tokens: int32 [...]; of any value where the mask is false.
      mask: bool [...], the tokens that count.
    """
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(mask, tokens, 0))
    return jnp.sum(jnp.where(mask, each, 0.0)) / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
