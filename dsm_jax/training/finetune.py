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

from dsm_jax import checkpoints
from dsm_jax.checkpoints import Model
from dsm_jax.convert.networks import read_dtype
from dsm_jax.errors import ConfigError, TrainingError
from dsm_jax.training import lora
from dsm_jax.training.data import Recording, batches, read_recordings
from dsm_jax.training.export import write_model
from dsm_jax.training.loop import Run, RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.stt import SttObjective, stt_loss
from dsm_jax.training.rows import SttRows, pad_to
from dsm_jax.training.step import Metrics, OptimizerConfig, TrainState, init, make_step


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
    model: str = checkpoints.DEFAULT
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
    model = checkpoints.load(config.model, dtype="float32", mesh=mesh, rules={})
    rows = SttRows(model, mesh, seconds=config.seconds, batch_size=config.encode_batch)
    trained = _Trained(model, config, dtype)
    optimizer = config.optimizer.build(config.run.steps)
    params, frozen = trained.split(model.lm_params)
    state = init(params, optimizer, config.run.seed, frozen=frozen)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    model = dataclasses.replace(model, lm_params=None)  # the state owns the parameters from here on
    del params, frozen
    state = run.restore(state) if resume else state
    step = make_step(trained.loss, optimizer, accumulate=config.accumulate)
    if int(state.step) < config.run.steps:
        data, evaluate = _learnt_from(rows, trained, config, mesh, int(state.step))
    else:  # only the model is still to be written
        data, evaluate = iter(()), None
    state = run.train(step, state, data, evaluate=evaluate)
    result = dataclasses.replace(
        model, lm_params=trained.merged(state.params, state.frozen), name=run.folder.absolute().name
    )
    write_model(result, run.folder / "model")
    return result


def _learnt_from(
    rows: SttRows, trained: "_Trained", config: FinetuneConfig, mesh: Mesh, first_step: int
) -> tuple[Iterator[Any], Callable[[TrainState], dict[str, float]] | None]:
    """Batches on their devices, and the measure of validation data; all data is checked before any is encoded."""

    def read(source: str) -> list[Recording]:
        return read_recordings(Path(source), rows.model.sample_rate, check=rows.check, skip_bad=config.skip_bad)

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
            part_BKT = pad_to(unseen_NKT[first : first + config.batch_size], config.batch_size)
            losses.append(np.asarray(trained.measure(state.params, state.frozen, jax.device_put(part_BKT, shared))))
        return {"validation_loss": float(np.concatenate(losses)[: len(unseen_NKT)].mean())}

    return data, evaluate


class _Trained:
    """Splits a language model's parameters into trained and frozen ones, and computes the loss of both together."""

    def __init__(self, model: Model, config: FinetuneConfig, dtype: np.dtype):
        self.adapters, self.objective, self._seed = config.lora, config.objective, config.run.seed
        self._graph: Any = model.lm_def
        self._dtype = dtype
        self.measure = jax.jit(self._row_losses)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Splits parameters into trained and frozen ones: new adapters and the model, or the model and ()."""
        if self.adapters is None:
            return params, ()
        return lora.init(params, self.adapters, jax.random.PRNGKey(self._seed)), params

    def merged(self, params: Any, frozen: Any) -> nnx.State:
        """Merges adapters into the language model's parameters, where there are any."""
        return params if self.adapters is None else lora.merge(frozen, params, self.adapters)

    def _network(self, params: Any, frozen: Any) -> Any:
        cast = jax.tree.map(lambda p: p.astype(self._dtype), self.merged(params, frozen))
        return nnx.merge(self._graph, cast)

    def loss(
        self, params: Any, frozen: Any, aux: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Computes the loss of a batch, for `make_step`."""
        value, metrics = stt_loss(self._network(params, frozen), batch["codes_BKT"], key, self.objective)
        return value, (aux, metrics)

    def _row_losses(self, params: Any, frozen: Any, codes_BKT: jax.Array) -> jax.Array:
        """Computes the loss of each row [B] without dropouts."""
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
