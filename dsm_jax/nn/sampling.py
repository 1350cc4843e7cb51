"""Choosing a token from scores.

Shape letters: B batch rows, V vocabulary.
Source: kyutai-labs/moshi@e6a55d2 moshi/utils/sampling.py: softmax of logits / temperature, the k most probable, one
of them by chance. Given the same noise both choose alike; of equal scores the lower ids are kept, where torch.topk
leaves open which.
"""

import jax
import jax.numpy as jnp


def sample(
    logits_BV: jax.Array, keys_B: jax.Array | None = None, *, temperature: float = 0.0, top_k: int = 0
) -> jax.Array:
    """Picks a token per row.

    Args:
      logits_BV: float32 scores.
      keys_B: a PRNG key per row; needed when the temperature is above 0.
      temperature: 0 takes the most probable token.
      top_k: keep this many of the most probable tokens; 0 keeps all.

    Returns:
      int32 tokens [B].

    Raises:
      ValueError: a temperature above 0 without keys.
    """
    if temperature <= 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if keys_B is None:
        raise ValueError(f"a temperature of {temperature} needs one PRNG key per row; pass keys_B, or temperature 0")
    vocabulary = logits_BV.shape[-1]
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys_B)
    scaled_BV = logits_BV / temperature
    if not 0 < top_k < vocabulary:
        return jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
    top_BK, index_BK = jax.lax.top_k(scaled_BV, top_k)
    choice_B = jnp.argmax(top_BK + jnp.take_along_axis(noise_BV, index_BK, axis=-1), axis=-1)
    return jnp.take_along_axis(index_BK, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
