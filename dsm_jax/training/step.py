"""The pure train step: gradients, accumulated over parts of a batch, and one update.

The step runs wherever its arrays are. For data parallelism, place the state on every device of a mesh and the rows of
each batch on one of them each: `jax.device_put` with `NamedSharding` of `PartitionSpec()` and of the mesh's axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsm_jax.errors import ConfigError

# (params, memory, batch, key) -> loss, (memory, metrics)
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training is made of: a run that is resumed from it goes on as if it had never stopped.

    Attributes:
      step: steps taken.
      params: what gradients train, float32.
      memory: what the loss carries from step to step, such as moving averages; () where there is nothing.
      optimizer: optax's state.
      key: of the whole run; each step folds its number in.
    """

    step: jax.Array
    params: Any
    memory: Any
    optimizer: optax.OptState
    key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a cosine to a fiftieth, and clipping by the global norm."""

    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    clip: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a run of so many steps."""
        warmup = min(self.warmup, steps // 2)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(steps, warmup + 1), self.learning_rate / 50
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay),
        )


def init(params: Any, memory: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step, which takes over the memory of what is given here.

    Args:
      params: what gradients are to train; they become float32, whatever floating-point type they come in.
      memory: what the loss carries along before the first step.
      optimizer: the same that the step is made with.
      seed: of the run.
    """

    def master(p: jax.Array) -> jax.Array:
        return jnp.asarray(p, jnp.float32 if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype)

    def strong(a: jax.Array) -> jax.Array:  # a step returns nothing of weak type; given some, it would compile twice
        return jnp.asarray(a, a.dtype)

    params = jax.tree.map(master, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, memory, optimizer.init(params), jax.random.PRNGKey(seed))
    return jax.tree.map(strong, state)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: Any = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """A jitted step that takes over its state's memory.

    A batch whose loss or gradient is not finite changes nothing but the step number, and says so: `finite` is 0.

    Args:
      loss: differentiated in its first argument; memory goes out in the shapes and dtypes that it came in.
      optimizer: from `OptimizerConfig.build`, or any of optax.
      accumulate: parts that a batch is cut into along its first axis; their gradients are averaged, so that the step
        is that of the whole batch where the loss is a mean over rows.
      compute_dtype: what parameters are cast to for the loss; the update stays in float32. The loss gets the batch
        and the memory as they are.

    Returns:
      Maps a state and a batch to the next state and metrics: `loss`, `gradient_norm`, `finite` and the loss's own.

    Raises:
      ConfigError: `accumulate` is below 1; or, of the step, a batch has no equal parts.
    """
    if accumulate < 1:
        raise ConfigError(f"a batch is to be cut into {accumulate} parts; give 1 or more")

    def cast_loss(params: Any, memory: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[Any, Metrics]]:
        if compute_dtype is not None:
            params = jax.tree.map(lambda p: p.astype(compute_dtype), params)
        value, aux = loss(params, memory, batch, key)
        return value.astype(jnp.float32), aux

    gradient = jax.value_and_grad(cast_loss, has_aux=True)

    def parts_of(a: jax.Array) -> jax.Array:
        if a.shape[0] % accumulate:
            raise ConfigError(
                f"a batch of {a.shape[0]} rows cannot be cut into {accumulate} equal parts; change either"
            )
        # A part takes rows from everywhere in the batch, so that on a mesh no row changes its device.
        return a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]).swapaxes(0, 1)

    def whole(state: TrainState, batch: Any, key: jax.Array) -> tuple[Any, Any, Metrics]:
        (value, (memory, metrics)), grads = gradient(state.params, state.memory, batch, key)
        return grads, memory, {**metrics, "loss": value}

    def by_parts(state: TrainState, batch: Any, key: jax.Array) -> tuple[Any, Any, Metrics]:
        def body(carry: tuple[Any, Any], part: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], Metrics]:
            total, memory = carry
            (value, (memory, metrics)), grads = gradient(state.params, memory, *part)
            return (jax.tree.map(jnp.add, total, grads), memory), {**metrics, "loss": value}

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        parts = jax.tree.map(parts_of, batch), jax.random.split(key, accumulate)
        (total, memory), metrics = jax.lax.scan(body, (zeros, state.memory), parts)
        return jax.tree.map(lambda g: g / accumulate, total), memory, jax.tree.map(lambda m: m.mean(0), metrics)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, memory, metrics = (whole if accumulate == 1 else by_parts)(state, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # what optax is written for, whatever the rest of a program wants
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new = (optax.apply_updates(state.params, updates), memory, optimizer_state)
        old = (state.params, state.memory, state.optimizer)
        params, memory, optimizer_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {**metrics, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}
        return TrainState(state.step + 1, params, memory, optimizer_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)
