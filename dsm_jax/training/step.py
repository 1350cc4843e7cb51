"""The pure train step: gradients, accumulated over parts of a batch, and one update.

The step runs on its arrays' devices. For data parallelism, replicate the state over a mesh and split the rows of each
batch: `jax.device_put` with a `NamedSharding` of `PartitionSpec()`, and of the mesh's axis.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.options import check_numbers

Metrics = dict[str, jax.Array]
# (params, frozen, aux, batch, key) -> float32 loss, (aux after the step, metrics)
Loss = Callable[[Any, Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, complete: a resumed run gives the same result as one that never stopped.

    Attributes:
      step: number of steps taken.
      params: trained parameters, float32.
      frozen: parameters that the loss only reads; checkpoints leave them out. () if there are none.
      aux: auxiliary state that the loss updates, such as moving averages; () if there is none.
      optimizer: optax's state.
      key: PRNG key of the whole run; each step folds in its number.
    """

    step: jax.Array
    params: Any
    frozen: Any
    aux: Any
    optimizer: optax.OptState
    key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW with warm-up, cosine decay to a fiftieth, and clipping by the global norm.

    Attributes:
      learning_rate: the highest; it would be down to a fiftieth in the step after the last one.
      warmup: steps in which the rate rises, from 0 in the first step; at most half of the run.
      weight_decay: decay of all trained parameters, so of norms, tables and adapters too.
      b1, b2: decays of the averages of the gradient and of its square.
      clip: largest norm of the gradient of all parameters together.
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, right, expected in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("warmup", self.warmup >= 0, "a number of steps, or 0 for none"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number above 0, or 0 for none"),
            ("b1", 0 <= self.b1 < 1, "a number from 0 to below 1"),
            ("b2", 0 <= self.b2 < 1, "a number from 0 to below 1"),
            ("clip", self.clip > 0, "a norm above 0"),
        ):
            if not right:
                raise ConfigError(f"{name} of the optimizer is {getattr(self, name)}; give {expected}")

    def build(self, steps: int) -> optax.GradientTransformation:
        """Build the optimizer for a run of `steps` steps."""
        warmup = min(self.warmup, steps // 2)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(steps, warmup + 1), self.learning_rate / 50
        )
        return optax.chain(
            clip_by_norm(self.clip),
            optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay),
        )


def norm(tree: Any) -> jax.Array:
    """Compute the norm of all values of a tree.

    The order of the sum depends on an array's axes. Weights with several axes are therefore reshaped to matrices, so
    that the choice of axes does not change the last bits of the result.
    """

    def matrix(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf
        value, inputs = leaf.get_value(), leaf.get_metadata().get("inputs")
        return value if inputs is None else value.reshape(-1, math.prod(value.shape[-inputs:]))

    return optax.tree.norm(jax.tree.map(matrix, tree, is_leaf=lambda node: isinstance(node, nnx.Variable)))


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Clip updates to a norm of `largest`, as `optax.clip_by_global_norm` does, but with this module's `norm`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        size = norm(updates)
        return jax.tree.map(
            lambda u: jnp.where(size < largest, u, (u / size.astype(u.dtype)) * largest), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init(
    params: Any, optimizer: optax.GradientTransformation, seed: int, *, frozen: Any = (), aux: Any = ()
) -> TrainState:
    """Make the state before the first step; a train step will donate the arrays.

    Args:
      params: parameters to train; floating-point parameters become float32.
      optimizer: the optimizer of `make_step`.
      seed: seed of the run.
      frozen: parameters that the loss only reads, in their own dtypes.
      aux: auxiliary state of the loss before the first step.
    """

    def master(p: jax.Array) -> jax.Array:
        return jnp.asarray(p, jnp.float32 if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype)

    def strong(
        a: jax.Array,
    ) -> jax.Array:  # weak types would compile the step twice: its results have none
        return jnp.asarray(a, a.dtype)

    params = jax.tree.map(master, params)
    trained = jnp.zeros((), jnp.int32), params, aux, optimizer.init(params), jax.random.PRNGKey(seed)
    step, params, aux, optimizer_state, key = jax.tree.map(strong, trained)
    return TrainState(step, params, frozen, aux, optimizer_state, key)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    place: Callable[[TrainState], TrainState] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make a jitted step; the step donates its state.

    A batch whose loss or gradient is not finite changes only the step number; the metric `finite` is then 0.

    Args:
      loss: loss function, differentiated in its first argument; returns `aux` in the same shapes and dtypes.
      optimizer: from `OptimizerConfig.build`, or any optax optimizer.
      accumulate: number of parts of a batch along its first axis. Gradients are averaged over the parts, which equals
        the gradient of the whole batch if the loss is a mean over rows.
      place: constrains the shardings of the next state, such as `Sharding.constrain`; None leaves them to the compiler.

    Returns:
      A function from a state and a batch to the next state and metrics: `loss`, `gradient_norm`, `finite` and the
      metrics of the loss.

    Raises:
      ConfigError: `accumulate` is below 1; or, when the step is called, a batch does not divide into equal parts.
    """
    if accumulate < 1:
        raise ConfigError(f"a batch is to be cut into {accumulate} parts; give 1 or more")

    gradient = jax.value_and_grad(loss, has_aux=True)

    def parts_of(a: jax.Array) -> jax.Array:
        if a.shape[0] % accumulate:
            raise ConfigError(
                f"a batch of {a.shape[0]} rows cannot be cut into {accumulate} equal parts; change either"
            )
        # A part takes every n-th row, so that no row of a batch on a mesh changes its device.
        return a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]).swapaxes(0, 1)

    def whole(state: TrainState, batch: Any, key: jax.Array) -> tuple[Any, Any, Metrics]:
        (value, (aux, metrics)), grads = gradient(state.params, state.frozen, state.aux, batch, key)
        return grads, aux, {**metrics, "loss": value}

    def by_parts(state: TrainState, batch: Any, key: jax.Array) -> tuple[Any, Any, Metrics]:
        def body(carry: tuple[Any, Any], part: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], Metrics]:
            total, aux = carry
            (value, (aux, metrics)), grads = gradient(state.params, state.frozen, aux, *part)
            return (jax.tree.map(jnp.add, total, grads), aux), {**metrics, "loss": value}

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        parts = jax.tree.map(parts_of, batch), jax.random.split(key, accumulate)
        (total, aux), metrics = jax.lax.scan(body, (zeros, state.aux), parts)
        return jax.tree.map(lambda g: g / accumulate, total), aux, jax.tree.map(lambda m: m.mean(0), metrics)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, aux, metrics = (whole if accumulate == 1 else by_parts)(state, batch, key)
        size = norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(size)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it; the program may use strict promotion
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new = (optax.apply_updates(state.params, updates), aux, optimizer_state)
        old = (state.params, state.aux, state.optimizer)
        params, aux, optimizer_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {**metrics, "gradient_norm": size, "finite": finite.astype(jnp.float32)}
        after = TrainState(state.step + 1, params, state.frozen, aux, optimizer_state, state.key)
        return after if place is None else place(after), metrics

    return jax.jit(step, donate_argnums=0)
