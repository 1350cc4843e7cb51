"""Choosing a token from scores.

Shape letters: B batch rows, V vocabulary, K tokens that are kept.
Source: kyutai-labs/moshi@e6a55d2 moshi/utils/sampling.py: softmax of logits / temperature, the k most probable, one
of them by chance. Given the same noise both choose alike; of equal scores the lower ids are kept, where torch.topk
leaves open which.
"""

import jax
import jax.numpy as jnp


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_k_B: jax.Array, *, max_top_k: int
) -> jax.Array:
    """Picks a token per row.

    Args:
      logits_BV: float32 scores.
      keys_B: a PRNG key per row, on which the row's noise depends, and on nothing else.
      temperature_B: float32; 0 takes the most probable token.
      top_k_B: int32, keeps this many of the most probable tokens; 0 keeps all, and so does the vocabulary's size.
      max_top_k: the largest `top_k_B` below the vocabulary's size that is honoured; 0 if there is none.

    Returns:
      int32 tokens [B].
    """
    vocabulary = logits_BV.shape[-1]
    max_top_k = min(max_top_k, vocabulary)

    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys_B)
    scaled_BV = logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    chosen_B = jnp.argmax(scaled_BV + noise_BV, axis=-1)
    if max_top_k:
        top_BK, index_BK = jax.lax.top_k(scaled_BV, max_top_k)
        noisy_BK = top_BK + jnp.take_along_axis(noise_BV, index_BK, axis=-1)
        kept_BK = jnp.arange(max_top_k) < top_k_B[:, None]
        choice_B1 = jnp.argmax(jnp.where(kept_BK, noisy_BK, -jnp.inf), axis=-1)[:, None]
        of_top_B = jnp.take_along_axis(index_BK, choice_B1, axis=-1)[:, 0]
        chosen_B = jnp.where((top_k_B > 0) & (top_k_B < vocabulary), of_top_B, chosen_B)
    return jnp.where(temperature_B > 0, chosen_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def sample_or_greedy(
    logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_k_B: jax.Array, *, max_top_k: int
) -> jax.Array:
    """Picks a token per row as `sample` does, and makes no noise while the temperature of every row is 0.

    The branch costs time to compile and breaks fusion, so it suits one large vocabulary that is mostly greedy (the
    words of speech to text), and not the codebooks of a depformer.
    """
    return jax.lax.cond(
        (temperature_B > 0).any(),
        lambda: sample(logits_BV, keys_B, temperature_B, top_k_B, max_top_k=max_top_k),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def top_k_capacity(*top_k: int) -> int:
    """Returns the least power of two that is no smaller than any of some top-k: few of them are ever compiled."""
    largest = max(top_k)
    return 1 << (largest - 1).bit_length() if largest > 0 else 0
