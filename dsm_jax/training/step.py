"""Compute the pure train step: gradients, accumulated over parts of a batch, and one update.

The step runs wherever its arrays are. For data parallelism, place the state on every device of a mesh and the rows of
each batch on one of them each: `jax.device_put` with `NamedSharding` of `PartitionSpec()` and of the mesh's axis.
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

Metrics = dict[str, jax.Array]
# (params, frozen, aux, batch, key) -> loss, (aux after the step, metrics)
Loss = Callable[[Any, Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Holds everything that a run needs to go on: a resumed run ends as if it had never stopped.

    Attributes:
      step: steps taken.
      params: parameters that gradients train, float32.
      frozen: parameters that the loss reads and nothing changes; checkpoints leave them out. () where there are none.
      aux: auxiliary state that the loss updates, such as moving averages; () where there is none.
      optimizer: optax's state.
      key: PRNG key of the whole run; each step folds its number in.
    """

    step: jax.Array
    params: Any
    frozen: Any
    aux: Any
    optimizer: optax.OptState
    key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Configures AdamW with warm-up, cosine decay to a fiftieth, and clipping by the global norm."""

    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    clip: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """Build the transformation for a run of `steps` steps."""
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

    The order in which squares are added up follows an array's axes. Weights of several axes are therefore taken as the
    matrices that they are, so that the axes of a parameter do not decide the last bit of what is learnt.
    """

    def matrix(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf
        value, inputs = leaf.get_value(), leaf.get_metadata().get("inputs")
        return value if inputs is None else value.reshape(math.prod(value.shape[:inputs]), -1)

    return optax.tree.norm(jax.tree.map(matrix, tree, is_leaf=lambda node: isinstance(node, nnx.Variable)))


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Scale updates down to a norm of `largest`, as `optax.clip_by_global_norm` does, by the norm of this module."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        size = norm(updates)
        return jax.tree.map(
            lambda u: jnp.where(size < largest, u, (u / size.astype(u.dtype)) * largest), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init(
    params: Any, optimizer: optax.GradientTransformation, seed: int, *, frozen: Any = (), aux: Any = ()
) -> TrainState:
    """Make the state before the first step; the state takes over the arrays given here.

    Args:
      params: parameters to train; floating-point ones become float32.
      optimizer: the same that the step is made with.
      seed: of the run.
      frozen: parameters that the loss only reads, in the dtypes that they have.
      aux: auxiliary state of the loss before the first step.
    """

    def master(p: jax.Array) -> jax.Array:
        return jnp.asarray(p, jnp.float32 if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype)

    def strong(a: jax.Array) -> jax.Array:  # a step returns nothing of weak type; given some, it would compile twice
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
    compute_dtype: Any = None,
    place: Callable[[TrainState], TrainState] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make a jitted step; the step donates its state.

    A batch whose loss or gradient is not finite changes nothing but the step number, and is reported: `finite` is 0.

    Args:
      loss: differentiated in its first argument; returns `aux` in the shapes and dtypes that it was given.
      optimizer: from `OptimizerConfig.build`, or any of optax.
      accumulate: parts that a batch is cut into along its first axis. Gradients are averaged over the parts, so the
        step equals that of the whole batch where the loss is a mean over rows.
      compute_dtype: dtype that `params` are cast to for the loss; the update stays in float32. Everything else is
        passed to the loss as it is.
      place: keeps the next state's arrays in their places on a mesh, such as `Sharding.constrain`; None leaves the
        places to the compiler.

    Returns:
      A function from a state and a batch to the next state and metrics: `loss`, `gradient_norm`, `finite` and the
      loss's own.

    Raises:
      ConfigError: `accumulate` is below 1; or, when the step is called, a batch does not divide into equal parts.
    """
    if accumulate < 1:
        raise ConfigError(f"a batch is to be cut into {accumulate} parts; give 1 or more")

    def cast_loss(params: Any, frozen: Any, aux: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        if compute_dtype is not None:
            params = jax.tree.map(lambda p: p.astype(compute_dtype), params)
        value, rest = loss(params, frozen, aux, batch, key)
        return value.astype(jnp.float32), rest

    gradient = jax.value_and_grad(cast_loss, has_aux=True)

    def parts_of(a: jax.Array) -> jax.Array:
        if a.shape[0] % accumulate:
            raise ConfigError(
                f"a batch of {a.shape[0]} rows cannot be cut into {accumulate} equal parts; change either"
            )
        # A part takes rows from everywhere in the batch, so that on a mesh no row changes its device.
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
        with jax.numpy_dtype_promotion("standard"):  # optax is written for it, whatever the rest of a program uses
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new = (optax.apply_updates(state.params, updates), aux, optimizer_state)
        old = (state.params, state.aux, state.optimizer)
        params, aux, optimizer_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {**metrics, "gradient_norm": size, "finite": finite.astype(jnp.float32)}
        after = TrainState(state.step + 1, params, state.frozen, aux, optimizer_state, state.key)
        return after if place is None else place(after), metrics

    return jax.jit(step, donate_argnums=0)
