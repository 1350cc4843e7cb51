"""Fine-tune a model on recordings with their text: all parameters, or low-rank adapters.

Rows and loss depend on the model's family: the text stream of speech-to-text models, the text and audio streams of
text-to-speech models, both decoders of conversational speech models. The codec and the pause heads are not trained.

Shape letters: B batch rows.
"""

import dataclasses
import json
import logging
import math
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsm_jax import checkpoints, files
from dsm_jax.checkpoints import Model
from dsm_jax.configs.json import to_dict
from dsm_jax.convert import convert
from dsm_jax.convert.files import VOICES
from dsm_jax.errors import CheckpointError, ConfigError, TrainingError
from dsm_jax.hub import expanded
from dsm_jax.models.family import FAMILIES
from dsm_jax.models.parameters import read_dtype
from dsm_jax.nn.precision import set_compute_dtype
from dsm_jax.options import check_functions, check_kind
from dsm_jax.progress import ProgressCallback
from dsm_jax.sharding import Sharding
from dsm_jax.training import lora
from dsm_jax.training.conversation_rows import CsmRows
from dsm_jax.training.data import EXPECTED, batches
from dsm_jax.training.encoding import pad_to, rows_place
from dsm_jax.training.finetune_config import FinetuneConfig, check_fits
from dsm_jax.training.loop import Run
from dsm_jax.training.losses.tts import TtsObjective
from dsm_jax.training.rows import SttRows, TtsRows
from dsm_jax.training.step import Metrics, TrainState, init, make_step
from dsm_jax.tts.voices import guidance_values, read_voice, write_voices

_log = logging.getLogger("dsm_jax.training")

# Maps (language model, batch, key, objective) to the loss and metrics.
_BatchLoss = Callable[[Any, Mapping[str, Any], jax.Array, Any], tuple[jax.Array, Metrics]]


class _Rows(Protocol):
    """The maker of a model's rows: reads and checks the examples of a data set, and makes rows of them."""

    def read(self, source: Path, *, skip_bad: bool) -> Sequence[Any]: ...

    def rows(self, examples: Any, /) -> list[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class _Task:
    """The functions that fine-tune one family of models, besides the loss, which its entry in `FAMILIES` names.

    Attributes:
      rows: makes the maker of a model's rows.
      objective: returns the weights and dropouts of a model's loss.
      layout: layout of the written model.
    """

    rows: Callable[[Model, Mesh, FinetuneConfig], _Rows]
    objective: Callable[[Model, FinetuneConfig], Any]
    layout: str


def _stt_rows(model: Model, mesh: Mesh, config: FinetuneConfig) -> SttRows:
    return SttRows(model, mesh, seconds=config.seconds, batch_size=config.encode_batch)


def _tts_rows(model: Model, mesh: Mesh, config: FinetuneConfig) -> TtsRows:
    return TtsRows(
        model,
        mesh,
        seconds=config.seconds,
        batch_size=config.encode_batch,
        voice=config.voice,
        guidance=config.guidance,
        prefix_seconds=config.prefix_seconds,
        seed=config.run.seed,
    )


def _csm_rows(model: Model, mesh: Mesh, config: FinetuneConfig) -> CsmRows:
    return CsmRows(model, mesh, positions=config.positions, batch_size=config.encode_batch)


def _tts_objective(model: Model, config: FinetuneConfig) -> TtsObjective:
    # Inference never runs a model with distilled guidance without text and voice.
    distilled = model.config.lm is not None and bool(guidance_values(model.config.lm))
    return dataclasses.replace(config.tts, unconditional=0.0) if distilled else config.tts


TASKS: Mapping[str, _Task] = {
    "stt": _Task(_stt_rows, lambda model, config: config.stt, "kyutai"),
    "tts": _Task(_tts_rows, _tts_objective, "kyutai"),
    "csm": _Task(_csm_rows, lambda model, config: config.csm, "transformers"),
}


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    mesh: Mesh | None = None,
    progress: ProgressCallback | None = None,
) -> Model:
    """Fine-tune a model and write it, in its family's layout and float32, to `model` in the run's folder.

    Args:
      config: settings of the run.
      resume: whether to continue from the run's last checkpoint.
      mesh: devices, with an axis "data" that splits each batch, an axis "model" that splits the parameters, or both.
        None uses as many of the available devices as can split a batch equally.
      progress: called after each step with the number of steps, those before a resumption included.

    Returns:
      The model that was written, in float32, with adapters merged.

    Raises:
      CheckpointError: the model cannot be loaded, or is of a family that is not trained.
      ConfigError: a setting does not fit the model or the devices, or `progress` is no function.
      TrainingError: the data cannot be trained on, a loss is not finite, a checkpoint or the model cannot be written,
        there is no run to resume, or a run would be overwritten.
    """
    check_kind("config", config, FinetuneConfig)
    check_functions(progress=progress)
    for source in filter(None, (config.data, config.validation)):
        if not expanded(source).exists():  # known before the model is fetched and loaded
            raise TrainingError(f"{source} does not exist; give {EXPECTED}")
    run = Run(expanded(config.output), config.run, progress)
    _check_output(run, resume)
    for unfinished in run.folder.glob(".model.*"):  # by a process that was killed while it wrote the model
        shutil.rmtree(unfinished, ignore_errors=True)
    dtype = read_dtype(config.compute_dtype)
    mesh = _mesh(config, mesh)
    sharding = Sharding(mesh)
    model = checkpoints.load(config.model, dtype="float32", sharding=sharding, revision=config.revision)
    task = _task_of(model)
    check_fits(config, model)
    rows = task.rows(model, mesh, config)
    trained = _Trained(model, task, config, dtype)
    optimizer = config.optimizer.build(config.run.steps)
    params, frozen = trained.split(model.lm_params)
    state = init(params, optimizer, config.run.seed, frozen=frozen)
    state = jax.device_put(state, sharding.places(state))
    model = dataclasses.replace(model, lm_params=None)  # the state owns the parameters from here on
    del params, frozen
    state = run.restore(state) if resume else state
    _keep_settings(run.folder / "settings.json", config, resume)
    step = make_step(trained.loss, optimizer, accumulate=config.accumulate, place=sharding.constrain)
    if int(state.step) < config.run.steps:
        data, evaluate = _read_data(rows, trained, config, mesh, int(state.step))
    else:  # only the model is still to be written
        data, evaluate = iter(()), None
    state = run.train(step, state, data, evaluate=evaluate)
    params = trained.merged(state.params, state.frozen, strength=config.strength)
    result = dataclasses.replace(model, lm_params=params, name=run.folder.absolute().name)
    write_model(result, run.folder / "model", _voices_to_write(result, config), layout=task.layout)
    return result


def _voices_to_write(model: Model, config: FinetuneConfig) -> dict[str, np.ndarray] | None:
    """Read the voice to write with the fine-tuned model, besides the model's own: the config's."""
    if config.voice is None:
        return None
    return {Path(config.voice).stem: read_voice(config.voice, model)}


def write_model(
    model: Model, folder: Path, voices: Mapping[str, np.ndarray] | None = None, *, layout: str = "kyutai"
) -> None:
    """Write a model in a published layout, in its own dtypes; a failure leaves nothing behind.

    Args:
      model: a language model with its codec and tokenizer.
      folder: a new folder; its parent exists.
      voices: voices to write besides the model's own: steps [X, C] by name.
      layout: name of a layout of the model's family.

    Raises:
      TrainingError: the folder exists, or cannot be written; the run's last checkpoint still exists.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".model.", dir=folder.parent) as scratch:
            checkpoints.save(model, Path(scratch) / "native")
            made = folder if voices is None else Path(scratch) / "made"
            convert(Path(scratch) / "native", made, to=layout)
            if voices is not None:
                write_voices(made / VOICES, voices)
                made.rename(folder)
    except (CheckpointError, OSError) as error:
        raise TrainingError(
            f"the model could not be written ({error}); its parameters are in the run's last checkpoint. Fix "
            "that, then continue with --resume"
        ) from error


def _task_of(model: Model) -> _Task:
    if model.config.model_type not in TASKS:
        raise CheckpointError(
            f"{model.name} is of type {model.config.model_type!r}, and {', '.join(TASKS)} models can be fine-tuned; "
            f"start from one such as {' or '.join(FAMILIES[name].example for name in TASKS)}"
        )
    return TASKS[model.config.model_type]


def _read_data(
    rows: _Rows, trained: "_Trained", config: FinetuneConfig, mesh: Mesh, first_step: int
) -> tuple[Iterator[Any], Callable[[TrainState], dict[str, float]] | None]:
    """Make batches on their devices, and the function that evaluates the validation data.

    All data is checked before any is encoded.
    """
    examples = rows.read(expanded(config.data), skip_bad=config.skip_bad)
    held_out = None
    if config.validation is not None:
        held_out = rows.read(expanded(config.validation), skip_bad=config.skip_bad)
    source = rows.rows(examples)
    drawn = batches(source, batch_size=config.batch_size, seed=config.run.seed, first_step=first_step)
    shared = rows_place(mesh)
    data = (jax.device_put(batch, shared) for batch in drawn)
    if held_out is None:
        return data, None
    validation = rows.rows(held_out)

    def evaluate(state: TrainState) -> dict[str, float]:
        losses: list[np.ndarray] = []
        for first in range(0, len(validation), config.batch_size):
            several = validation[first : first + config.batch_size]
            batch = jax.tree.map(lambda *arrays: pad_to(np.stack(arrays), config.batch_size), *several)
            losses.append(np.asarray(trained.measure(state.params, state.frozen, jax.device_put(batch, shared))))
        return {"validation_loss": float(np.concatenate(losses)[: len(validation)].mean())}

    return data, evaluate


class _Trained:
    """A language model's parameters split into trained and frozen ones, and the loss of both together."""

    def __init__(self, model: Model, task: _Task, config: FinetuneConfig, dtype: np.dtype):
        self.adapters, self._seed = config.lora, config.run.seed
        loss = FAMILIES[model.config.model_type].loss
        assert loss is not None
        self._loss: _BatchLoss = pkgutil.resolve_name(loss)
        self._objective = task.objective(model, config)
        self._graph: Any = model.lm_def
        self._dtype = dtype
        self.measure = jax.jit(self._row_losses)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Return the trained and the frozen parameters: adapters and the model, or the model and its pause heads."""
        if self.adapters is None:
            # The heads have no gradient here, but weight decay would shrink them.
            heads, others = nnx.split_state(params, nnx.PathContains("extra_heads"), ...)
            return others, heads
        return lora.init(params, self.adapters, jax.random.PRNGKey(self._seed)), params

    def merged(self, params: Any, frozen: Any, *, strength: float = 1.0) -> nnx.State:
        """Return the language model's parameters, with adapters merged if there are any."""
        if self.adapters is None:
            return nnx.merge_state(params, frozen)
        return lora.merge(frozen, params, self.adapters, strength=strength)

    def _network(self, params: Any, frozen: Any) -> Any:
        cast = jax.tree.map(lambda p: p.astype(self._dtype), self.merged(params, frozen))
        network = nnx.merge(self._graph, cast)
        set_compute_dtype(network, self._dtype)
        return network

    def loss(
        self, params: Any, frozen: Any, aux: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Compute the loss of a batch, for `make_step`."""
        value, metrics = self._loss(self._network(params, frozen), batch, key, self._objective)
        return value, (aux, metrics)

    def _row_losses(self, params: Any, frozen: Any, batch: Any) -> jax.Array:
        """Compute the loss of each row [B] without dropouts."""
        network, key = self._network(params, frozen), jax.random.PRNGKey(0)
        objective = self._objective.without_dropout()

        def row_loss(row: Any) -> jax.Array:
            return self._loss(network, jax.tree.map(lambda a: a[None], row), key, objective)[0]

        return jax.vmap(row_loss)(batch)


def _check_output(run: Run, resume: bool) -> None:
    if (run.folder / "model").exists():
        raise TrainingError(f"{run.folder}/model exists, so this run is done; choose another output, or move it away")
    if resume:
        run.resumed_step()
    elif (step := run.latest()) is not None:
        raise TrainingError(
            f"{run.folder} holds a run that is at step {step}; continue with --resume, or choose another output"
        )


def _keep_settings(path: Path, config: FinetuneConfig, resume: bool) -> None:
    """Write a run's settings; refuse to resume with another base model or other adapters, which would fit unnoticed."""
    settings = to_dict(config)
    if resume and path.exists():
        try:
            before = files.parse_json(path.read_bytes(), "the settings of the run", line=False)
            changed = {name: (before[name], value) for name, value in settings.items() if before[name] != value}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); remove it if the settings are those that the run began with"
            ) from None
        for name in sorted(changed.keys() & {"model", "revision", "lora"}):
            raise TrainingError(
                f"{name} is {changed[name][1]!r}, and the run to resume has {changed[name][0]!r} ({path}); resume with "
                "that, or choose another output"
            )
        if changed.keys() - {"output"}:
            _log.info("resumed with other settings of %s", ", ".join(sorted(changed.keys() - {"output"})))
    try:
        files.write_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be written ({error.strerror}); make room, then start again") from error


def _mesh(config: FinetuneConfig, mesh: Mesh | None) -> Mesh:
    """Check the given mesh, or make one of as many devices as can split a batch's part equally."""
    rows = config.batch_size // config.accumulate
    if mesh is None:
        return Mesh(jax.devices()[: math.gcd(rows, jax.device_count())], ("data",))
    if not set(mesh.axis_names) <= {"data", "model"}:
        raise ConfigError(
            f'the mesh has the axes {list(mesh.axis_names)}; name them "data", over which a batch\'s rows are spread, '
            'and "model", over which the parameters are'
        )
    if rows % (shares := mesh.shape.get("data", 1)):
        raise ConfigError(
            f"{rows} rows at a time cannot be shared equally by the {shares} devices of the mesh; give a multiple "
            f"of {shares}"
        )
    return mesh
