"""Low-rank adapters: a model learns through a small addition to each of some matrices, the matrices stay as they are.

A matrix W [in, out] becomes W + scale * A @ B, where A is [in, rank], B is [rank, out] and scale is alpha / rank. B is
zero before training, so that the model begins as it was. Inputs and outputs may be several axes each, such as heads
and their width. A parameter that stacks matrices, such as one embedding per stream, has adapters of its own for each;
vectors, such as the scales of norms, are left alone.

Source: Hu et al. 2021 (LoRA), section 4.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.nn.linear import fan_in

# (A [..., *in, rank], B [..., rank, *out]) by the dotted path of the parameter that they are added to, float32.
Adapters = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices are adapted, and how freely.

    Attributes:
      rank: of each addition.
      alpha: its weight, times the rank.
      targets: regular expressions; a parameter is adapted where one is found in its dotted path, which looks like
        "transformer.layers.0.self_attn.in_proj.weight_DPKH".
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
        """What A @ B is multiplied by."""
        return self.alpha / self.rank


def init(params: nnx.State, config: LoraConfig, key: jax.Array) -> Adapters:
    """Adapters that change nothing yet: A is normal with a variance of 1 / in, B is zero.

    Args:
      params: of a `DelayedStreamsLM`.
      config: which of them, and the rank.
      key: PRNG key.

    Raises:
      ConfigError: a target that is found in no matrix's path.
    """
    matrices = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(params)
        if variable.get_value().ndim >= 2
    }
    for target in config.targets:
        if not any(re.search(target, name) for name in matrices):
            some = ", ".join(list(matrices)[:8])
            raise ConfigError(f"the target {target!r} is found in no matrix of the model; its matrices are {some}, ...")
    adapters = {}
    for name, variable in matrices.items():
        if any(re.search(target, name) for target in config.targets):
            stack, inputs, outputs = _axes(variable)
            own = jax.random.fold_in(key, len(adapters))
            a = jax.random.normal(own, (*stack, *inputs, config.rank), jnp.float32) * fan_in(variable) ** -0.5
            adapters[name] = a, jnp.zeros((*stack, config.rank, *outputs), jnp.float32)
    return adapters


def _axes(variable: nnx.Variable) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of the axes that stack matrices, of those that are summed over, and of those that are made."""
    shape, inputs = variable.get_value().shape, variable.get_metadata().get("inputs")
    if inputs is None:
        return shape[:-2], shape[-2:-1], shape[-1:]
    return (), shape[:inputs], shape[inputs:]


def merge(params: nnx.State, adapters: Adapters, config: LoraConfig) -> nnx.State:
    """The parameters with their additions, computed in float32, in the dtypes that they had.

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

    def adapted(name: str, variable: nnx.Variable) -> nnx.Variable:
        if name not in adapters:
            return variable
        weight = variable.get_value()
        a, b = (part.astype(jnp.float32) for part in adapters[name])
        stack = tuple(range(len(_axes(variable)[0])))
        dimensions = ((a.ndim - 1,), (len(stack),)), (stack, stack)
        added = jax.lax.dot_general(a, b, dimensions, precision="highest")
        return variable.replace((weight.astype(jnp.float32) + config.scale * added).astype(weight.dtype))

    return nnx.from_flat_state([(path, adapted(name, variable)) for name, path, variable in flat])
