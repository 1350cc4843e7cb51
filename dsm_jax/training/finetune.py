"""Fine-tunes a speech-to-text model on recordings with words, all of it or through low-rank adapters.

The codec is not trained, and neither are pause heads: the loss is of the text alone.

Shape letters: B batch rows, N rows of validation data, K streams (text first), T frames.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsm_jax import checkpoints, hub
from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError, TrainingError
from dsm_jax.models.parameters import read_dtype
from dsm_jax.nn.precision import set_compute_dtype
from dsm_jax.sharding import Sharding
from dsm_jax.training import lora, manifest
from dsm_jax.training.batches import batches
from dsm_jax.training.export import write_model
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.rows import Rows, filled
from dsm_jax.training.run import Run, RunConfig
from dsm_jax.training.step import Metrics, OptimizerConfig, TrainState, init, make_step
from dsm_jax.training.stt import SttObjective, stt_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What to learn from, how, and where to.

    Attributes:
      data: a JSON Lines file or a folder; see `dsm_jax.training.manifest`.
      output: the run's folder; the model is written to `model` in it.
      run: how long.
      model: where to begin, as for `dsm_jax.load`.
      validation: data that is not learnt from; its loss is measured at each checkpoint.
      skip_bad: leave faulty recordings out instead of refusing all.
      seconds: of a recording in a row, at most.
      batch_size: rows in a batch.
      accumulate: parts that a batch is cut into to save memory.
      encode_batch: rows that the codec encodes at a time.
      compute_dtype: of the model in the loss; what is learnt is always float32.
      optimizer: of the run.
      objective: what counts how much.
      lora: adapters to learn in place of the whole model.
    """

    data: str
    output: str
    run: RunConfig
    model: str = hub.DEFAULT
    validation: str | None = None
    skip_bad: bool = False
    seconds: float = 20.0
    batch_size: int = 8
    accumulate: int = 1
    encode_batch: int = 8
    compute_dtype: str = "float32"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5)
    objective: SttObjective = SttObjective()
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.seconds < 1:
            raise ConfigError(f"a row has {self.seconds} seconds of a recording; give at least 1")
        if min(self.batch_size, self.accumulate, self.encode_batch) < 1 or self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size is {self.batch_size}, accumulate {self.accumulate} and encode_batch {self.encode_batch}; "
                "give at least 1, and a batch_size that is a multiple of accumulate"
            )


def finetune(config: FinetuneConfig, *, resume: bool = False, mesh: Mesh | None = None) -> Model:
    """Fine-tunes a model and writes it, in Kyutai's layout and float32, to `model` in the run's folder.

    Args:
      config: of the run.
      resume: go on from the run's last checkpoint.
      mesh: devices that share each batch, the parameters being on all of them; None takes as many of those there are
        as can share one equally.

    Returns:
      The model that was written, in float32; adapters are merged into it.

    Raises:
      CheckpointError: the model cannot be loaded, or does not transcribe.
      ConfigError: settings that do not fit the model or the devices.
      TrainingError: data that cannot be learnt from, a loss that is not finite, a checkpoint or model that cannot be
        written, or a run to resume that is not there, or one that is and would be lost.
    """
    run = Run(Path(config.output), config.run)
    _check_output(run, resume)
    dtype = read_dtype(config.compute_dtype)
    mesh = _mesh(config, mesh)
    model = checkpoints.load(config.model, dtype="float32", sharding=Sharding(mesh, ()))
    rows = Rows(model, mesh, seconds=config.seconds, at_once=config.encode_batch)
    trained = _Trained(model, config, dtype)
    optimizer = config.optimizer.build(config.run.steps)
    state = init(trained.start(), (), optimizer, config.run.seed)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    model = dataclasses.replace(model, lm_params=None)  # the state has them now, or `trained` beside adapters
    state = run.restore(state) if resume else state
    step = trained.step(make_step(trained.loss, optimizer, accumulate=config.accumulate))
    if int(state.step) < config.run.steps:
        data, evaluate = _learnt_from(rows, trained, config, mesh, int(state.step))
    else:  # only the model is still to be written
        data, evaluate = iter(()), None
    state = run.train(step, state, data, evaluate=evaluate)
    result = dataclasses.replace(model, lm_params=trained.whole(state.params), name=run.folder.absolute().name)
    write_model(result, run.folder / "model")
    return result


def _learnt_from(
    rows: Rows, trained: "_Trained", config: FinetuneConfig, mesh: Mesh, first_step: int
) -> tuple[Iterator[Any], Callable[[TrainState], dict[str, float]] | None]:
    """Batches on their devices, and the measure of validation data; all data is checked before any is encoded."""

    def read(source: str) -> list[manifest.Recording]:
        return manifest.read(Path(source), rows.model.sample_rate, check=rows.check, skip_bad=config.skip_bad)

    recordings = read(config.data)
    unseen = None if config.validation is None else read(config.validation)
    source = [{"codes_BKT": codes_KT} for codes_KT in rows.encode(recordings)]
    drawn = batches(source, batch_size=config.batch_size, seed=config.run.seed, first_step=first_step)
    shared = NamedSharding(mesh, PartitionSpec("data"))
    data = (jax.device_put(batch, shared) for batch in drawn)
    if unseen is None:
        return data, None
    unseen_NKT = rows.encode(unseen)

    def evaluate(state: TrainState) -> dict[str, float]:
        losses: list[np.ndarray] = []
        for first in range(0, len(unseen_NKT), config.batch_size):
            part_BKT = filled(unseen_NKT[first : first + config.batch_size], config.batch_size)
            losses.append(np.asarray(trained.measure(state.params, jax.device_put(part_BKT, shared))))
        return {"validation_loss": float(np.concatenate(losses)[: len(unseen_NKT)].mean())}

    return data, evaluate


class _Trained:
    """What is trained of a model, and the loss of it.

    With adapters the model's own parameters are the loss's memory, which a step takes over and gives back. They are
    kept here and not in the state, so that checkpoints hold adapters only.
    """

    def __init__(self, model: Model, config: FinetuneConfig, dtype: np.dtype):
        self.adapters, self.objective, self._seed = config.lora, config.objective, config.run.seed
        self._graph: Any = model.lm_def
        self._dtype = dtype
        self._frozen: Any = model.lm_params
        self._measure = jax.jit(self._row_losses)

    def start(self) -> Any:
        """What is trained, before the first step; to be asked for once."""
        params = self._frozen
        if self.adapters is not None:
            return lora.init(params, self.adapters, jax.random.PRNGKey(self._seed))
        self._frozen = ()
        return params

    def _merged(self, params: Any, frozen: Any) -> nnx.State:
        return params if self.adapters is None else lora.merge(frozen, params, self.adapters)

    def whole(self, params: Any) -> nnx.State:
        """The language model's parameters, adapters merged."""
        return self._merged(params, self._frozen)

    def _network(self, params: Any, frozen: Any) -> Any:
        cast = jax.tree.map(lambda p: p.astype(self._dtype), self._merged(params, frozen))
        network = nnx.merge(self._graph, cast)
        set_compute_dtype(network, self._dtype)
        return network

    def loss(self, params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """For `make_step`."""
        value, metrics = stt_loss(self._network(params, frozen), batch["codes_BKT"], key, self.objective)
        return value, (frozen, metrics)

    def step(self, inner: Any) -> Any:
        """The step over states that do not hold what is frozen."""

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            after, metrics = inner(dataclasses.replace(state, memory=self._frozen), batch)
            self._frozen = after.memory
            return dataclasses.replace(after, memory=()), metrics

        return step

    def measure(self, params: Any, codes_BKT: jax.Array) -> jax.Array:
        """The loss of each row [B], nothing hidden from the model."""
        return self._measure(params, self._frozen, codes_BKT)

    def _row_losses(self, params: Any, frozen: Any, codes_BKT: jax.Array) -> jax.Array:
        plain = SttObjective(padding_weight=self.objective.padding_weight)
        network, key = self._network(params, frozen), jax.random.PRNGKey(0)
        return jax.vmap(lambda codes_KT: stt_loss(network, codes_KT[None], key, plain)[0])(codes_BKT)


def _check_output(run: Run, resume: bool) -> None:
    if (run.folder / "model").exists():
        raise TrainingError(f"{run.folder}/model exists, so this run is done; choose another output, or move it away")
    step = run.latest()
    if step is None and resume:
        raise TrainingError(f"{run.folder} holds no checkpoint to resume from; start without --resume")
    if step is not None and not resume:
        raise TrainingError(
            f"{run.folder} holds a run that is at step {step}; go on with --resume, or choose another output"
        )


def _mesh(config: FinetuneConfig, mesh: Mesh | None) -> Mesh:
    """One axis of devices, each with as many rows of a batch's part as the others."""
    rows = config.batch_size // config.accumulate
    if mesh is None:
        devices = jax.devices()[: math.gcd(rows, jax.device_count())]
    elif rows % mesh.size == 0:
        devices = list(mesh.devices.flat)
    else:
        raise ConfigError(
            f"{rows} rows at a time cannot be shared equally by the {mesh.size} devices of the mesh; give a multiple "
            f"of {mesh.size}"
        )
    return Mesh(devices, ("data",))
