"""Trains low-rank adapters: a small addition to each of some matrices, which themselves stay frozen.

A matrix W [in, out] becomes W + scale * A @ B, where A is [in, rank], B is [rank, out] and scale is alpha / rank. B is
zero before training, so that the model starts unchanged. A parameter that stacks matrices, such as one embedding for
each stream, has adapters for each matrix; vectors, such as the scales of norms, have none.

Source: Hu et al. 2021 (LoRA), section 4.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.convert.networks import flatten
from dsm_jax.errors import ConfigError

# (A [..., in, rank], B [..., rank, out]) by the dotted path of the parameter that they are added to, float32.
Adapters = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Chooses the matrices that have adapters, and the rank and scale of these.

    Attributes:
      rank: of each adapter.
      alpha: scale of the adapters, times the rank.
      targets: regular expressions; a parameter has an adapter if one of them matches part of its dotted path, such as
        "transformer.layers.0.self_attn.in_proj_DE".
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("self_attn", "feedforward")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of the adapters is {self.rank}; give at least 1")
        if not self.targets:
            raise ConfigError("the adapters have no targets; name parts of the model, such as 'self_attn'")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(f"the target {target!r} is no regular expression ({error}); mend it") from None

    @property
    def scale(self) -> float:
        """The factor of A @ B."""
        return self.alpha / self.rank


def init(params: nnx.State, config: LoraConfig, key: jax.Array) -> Adapters:
    """Makes adapters that change nothing yet: A is normal with a variance of 1 / in, B is zero.

    Args:
      params: of a `DelayedStreamsLM`.
      config: targets and rank.
      key: PRNG key.

    Raises:
      ConfigError: a target that matches no matrix.
    """
    matrices = {name: array.shape for name, array in flatten(params).items() if array.ndim >= 2}
    for target in config.targets:
        if not any(re.search(target, name) for name in matrices):
            some = ", ".join(list(matrices)[:8])
            raise ConfigError(f"the target {target!r} is found in no matrix of the model; its matrices are {some}, ...")
    adapters = {}
    for name, (*stack, width, out) in matrices.items():
        if any(re.search(target, name) for target in config.targets):
            own = jax.random.fold_in(key, len(adapters))
            a = jax.random.normal(own, (*stack, width, config.rank), jnp.float32) * width**-0.5
            adapters[name] = a, jnp.zeros((*stack, config.rank, out), jnp.float32)
    return adapters


def merge(params: nnx.State, adapters: Adapters, config: LoraConfig) -> nnx.State:
    """Adds adapters to parameters, computed in float32, in the dtypes that the parameters have.

    Args:
      params: as given to `init`.
      adapters: of these parameters.
      config: of the adapters.

    Raises:
      ConfigError: an adapter of a parameter that is not there.
    """
    flat = [(".".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(params)]
    if strange := sorted(adapters.keys() - {name for name, _, _ in flat}):
        raise ConfigError(
            f"the adapters are of parameters that the model does not have, {strange[0]} first; use its own"
        )

    def adapted(name: str, weight: jax.Array) -> jax.Array:
        if name not in adapters:
            return weight
        a, b = adapters[name]
        added = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        return (weight.astype(jnp.float32) + config.scale * added).astype(weight.dtype)

    return nnx.from_flat_state([(path, v.replace(adapted(name, v.get_value()))) for name, path, v in flat])
