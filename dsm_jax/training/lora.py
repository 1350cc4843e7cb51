"""Low-rank adapters: training changes small additions to some matrices, and leaves the matrices as they are.

A matrix W [out, in] becomes W + scale * (A @ B)^T, where A is [in, rank], B is [rank, out] and scale is alpha / rank. B
is zero before training, so that the adapters do not change the model at first. Inputs and outputs may be several axes
each, such as heads and their width. A parameter that stacks matrices, such as one embedding per stream, has adapters
for each matrix; vectors, such as the scales of norms, are not adapted.

Source: Hu et al. 2021 (LoRA), section 4.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.nn.linear import fan_in
from dsm_jax.options import check_numbers

# (A [..., *in, rank], B [..., rank, *out]), float32, by the dotted path of the adapted parameter.
Adapters = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapted matrices, and the rank and scale of their adapters.

    Attributes:
      rank: rank of each addition.
      alpha: scale of each addition, times the rank.
      targets: regular expressions; a parameter is adapted if any of them matches in its dotted path, such as
        "transformer.layers.0.self_attn.in_proj.weight_PKHD".
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("self_attn", "feedforward")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.rank < 1:
            raise ConfigError(f"the rank of the adapters is {self.rank}; give at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"the alpha of the adapters is {self.alpha}; give a number above 0")
        if isinstance(self.targets, str):  # each of its letters would be a target
            raise ConfigError(f"the targets are the text {self.targets!r}; give a tuple of texts: ({self.targets!r},)")
        if not self.targets:
            raise ConfigError("the adapters have no targets; name parts of the model, such as 'self_attn'")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(f"the target {target!r} is no regular expression ({error}); fix it") from None

    @property
    def scale(self) -> float:
        """Factor of A @ B."""
        return self.alpha / self.rank


def init(params: nnx.State, config: LoraConfig, key: jax.Array) -> Adapters:
    """Make adapters that do not change the model yet: A is normal with a variance of 1 / in, B is zero.

    Args:
      params: parameters of a language model.
      config: targets and rank.
      key: PRNG key.

    Raises:
      ConfigError: a target matches no matrix, or the rank is above those of all targets.
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
    chosen = {name: one for name, one in matrices.items() if any(re.search(target, name) for target in config.targets)}
    # An addition of a matrix's full rank can already be any matrix: a higher rank only costs memory.
    highest = max(min(math.prod(inputs), math.prod(outputs)) for _, inputs, outputs in map(_axes, chosen.values()))
    if config.rank > highest:
        raise ConfigError(
            f"the rank of the adapters is {config.rank}, and the matrices to adapt have ranks of up to {highest}; give "
            "that at most, or train the whole model without adapters"
        )
    adapters = {}
    for name, variable in chosen.items():
        stack, inputs, outputs = _axes(variable)
        own = jax.random.fold_in(key, len(adapters))
        a = jax.random.normal(own, (*stack, *inputs, config.rank), jnp.float32) * fan_in(variable) ** -0.5
        adapters[name] = a, jnp.zeros((*stack, config.rank, *outputs), jnp.float32)
    return adapters


def _axes(variable: nnx.Variable) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of a parameter's stacking axes, input axes and output axes."""
    shape, about = variable.get_value().shape, variable.get_metadata()
    if (inputs := about.get("inputs")) is None:
        return shape[:-2], shape[-2:-1], shape[-1:]
    stacked = about.get("stacked", 0)
    return shape[:stacked], shape[-inputs:], shape[stacked:-inputs]


def merge(params: nnx.State, adapters: Adapters, config: LoraConfig, *, strength: float = 1.0) -> nnx.State:
    """Add the adapters to the parameters, in float32, and cast the sums to the parameters' dtypes.

    Args:
      params: the same as for `init`.
      adapters: adapters of these parameters.
      config: settings of the adapters.
      strength: share of the additions that is added.

    Raises:
      ConfigError: an adapter belongs to no parameter.
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
        factors = [(a, a.ndim - 1), (b, len(stack))]  # with the axis of the rank; a table's rows are its inputs
        if "inputs" in variable.get_metadata():
            factors.reverse()
        (left, left_rank), (right, right_rank) = factors
        dimensions = ((left_rank,), (right_rank,)), (stack, stack)
        added = jax.lax.dot_general(left, right, dimensions, precision="highest")
        return variable.replace((weight.astype(jnp.float32) + strength * config.scale * added).astype(weight.dtype))

    return nnx.from_flat_state([(path, adapted(name, variable)) for name, path, variable in flat])
