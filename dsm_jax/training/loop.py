"""Run a training in a folder: steps, metrics, checkpoints, and a plot of the loss at the end.

A run's folder holds `metrics.jsonl` (one object per logged step), `checkpoints/` (Orbax, the last few) and `curve.png`.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsm_jax import files
from dsm_jax.convert import native
from dsm_jax.errors import ConfigError, TrainingError
from dsm_jax.options import check_numbers
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.training.curve import Record, draw_curve
from dsm_jax.training.data import batches
from dsm_jax.training.step import Loss, Metrics, OptimizerConfig, TrainState, init, make_step

StepFunction = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
_log = logging.getLogger("dsm_jax.training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of a run, and steps between its reports and checkpoints.

    Attributes:
      steps: number of steps of the whole run, those before a resumption included.
      seed: seed of the batches, the dropouts and new parameters, from 0, of 32 bits.
      log_every: steps from one line of `metrics.jsonl` to the next.
      save_every: steps from one checkpoint to the next; the last step has one too.
      keep: number of checkpoints that stay on disk.
    """

    steps: int
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.seed < 2**32:  # JAX takes more, and drops the bits beyond 32
            raise ConfigError(f"the seed of a run is {self.seed}; give a number from 0 to {2**32 - 1}")
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a run is {getattr(self, name)}; give 1 or more")


class Run:
    """A run's folder, with the functions that write and read it.

    Args:
      folder: the run's folder; made if it does not exist.
      config: settings of the run.
      progress: called after each step with the number of steps, those before a resumption included.

    Raises:
      TrainingError: the folder cannot be made, or a library that training needs is not installed.
    """

    def __init__(self, folder: Path, config: RunConfig, progress: ProgressCallback | None = None):
        for name in ("grain", "matplotlib", "PIL"):  # at the end of a long run would be too late
            if importlib.util.find_spec(name) is None:
                raise TrainingError(f"training needs {name}, which is not installed; run: pip install 'dsm-jax[train]'")
        self.folder, self.config, self._progress = folder, config, progress
        self._checkpoints = (folder / "checkpoints").absolute()
        self._metrics = folder / "metrics.jsonl"
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{folder} cannot be made ({error.strerror}); choose another folder") from None

    def latest(self) -> int | None:
        """Find the step of the last checkpoint; None if there is none."""
        return max(self._saved(), default=None)

    def _saved(self) -> list[int]:
        # Orbax gives an unfinished checkpoint a longer name than its number, and renames it at the end.
        return sorted(int(p.name) for p in self._checkpoints.glob("*") if p.name.isdecimal())

    def save(self, state: TrainState) -> None:
        """Write a checkpoint without the frozen parameters, then remove the oldest checkpoints.

        Raises:
          TrainingError: the checkpoint cannot be written, or exists; earlier checkpoints still exist.
        """
        step, state = int(state.step), dataclasses.replace(state, frozen=())
        try:
            self._clear()  # leftovers of a run that was killed
            size, free = sum(a.nbytes for a in jax.tree.leaves(state)), shutil.disk_usage(self._checkpoints).free
            if free < size:
                raise OSError(f"it needs {size / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free")
            native.save_tree(self._checkpoints / str(step), state)
        except Exception as error:  # errors of the disk have many types in Orbax's layers
            self._clear()
            # The file system's message comes last, after those of Orbax and tensorstore.
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2] or type(error).__name__
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {self._checkpoints} ({reason.strip()}); "
                f"{self._have()}. Fix that, then {self._again()}"
            ) from error
        for old in self._saved()[: -self.config.keep]:
            # Renamed first, so that an interrupted removal leaves nothing that looks like a checkpoint.
            with contextlib.suppress(OSError):
                (self._checkpoints / str(old)).rename(self._checkpoints / f"{old}.old")
        self._clear()

    def _clear(self) -> None:
        for path in self._checkpoints.glob("*"):
            if not path.name.isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def _have(self) -> str:
        saved = self.latest()
        return f"the last one is of step {saved}" if saved is not None else "there is none before it"

    def _again(self) -> str:
        return "start again" if self.latest() is None else "continue with --resume"

    def resumed_step(self) -> int:
        """Return the step of the last checkpoint, which a resumed run continues from.

        Raises:
          TrainingError: there is no checkpoint, or it is of a later step than the last one of this run.
        """
        step = self.latest()
        if step is None:
            raise TrainingError(f"{self.folder} holds no checkpoint to resume from; start without --resume")
        if step > self.config.steps:
            raise TrainingError(
                f"{self.folder} holds a checkpoint of step {step}, and the run is to end at step {self.config.steps}; "
                f"give {step} steps or more, or choose another folder"
            )
        return step

    def restore(self, like: TrainState) -> TrainState:
        """Read the last checkpoint.

        Args:
          like: a state of the same run, with the structure and sharding of the arrays, and the frozen parameters.

        Raises:
          TrainingError: there is no checkpoint, it belongs to another run, it is of a later step than the last one of
            this run, or it is damaged.
        """
        import orbax.checkpoint as ocp

        step = self.resumed_step()
        folder = self._checkpoints / str(step)
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
            dataclasses.replace(like, frozen=()),
        )
        try:
            with native.without_log(), native.plain_path(folder) as path, ocp.StandardCheckpointer() as checkpointer:
                held = checkpointer.metadata(path).item_metadata
                if held is None:
                    raise ValueError("it has no metadata of its arrays")
                faults = _faults(ocp.tree.to_flat_dict(held.tree, sep="."), ocp.tree.to_flat_dict(target, sep="."))
                # Checked before restoring, as Orbax would cast some arrays that do not fit.
                state = None if faults else checkpointer.restore(path, target)
        except Exception as error:  # Orbax raises many types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"{folder} cannot be read ({reason}); remove it to resume from the one before"
            ) from error
        if state is None:
            more = f", and {len(faults) - 1} more" if faults[1:] else ""
            raise TrainingError(
                f"{folder} does not fit this run ({faults[0]}{more}); resume with the config that it was made with"
            )
        return dataclasses.replace(state, frozen=like.frozen)

    def train(
        self,
        step: StepFunction,
        state: TrainState,
        data: Iterator[Any],
        *,
        evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    ) -> TrainState:
        """Train to the last step; log each record, and report each step.

        Args:
          step: train step, from `make_step`.
          state: the initial or a restored state; donated to the steps.
          data: batches, starting with the batch of the next step.
          evaluate: computes further metrics at each checkpoint.

        Returns:
          The state after the last step, which has been saved.

        Raises:
          TrainingError: a loss is not finite, a batch cannot be read, a checkpoint or the metrics cannot be written, or
            the folder holds a later checkpoint.
        """
        first, last = int(state.step), self.config.steps
        if (saved := self.latest()) is not None and saved > first:
            raise TrainingError(
                f"{self.folder} holds a checkpoint of step {saved}, and this run would begin at step {first}; continue "
                "from there with --resume, or choose another folder"
            )
        records = self._read_records(first)
        pending: list[Metrics] = []
        began = time.perf_counter()
        self._report(first)
        number = first
        try:
            for number in range(first + 1, last + 1):
                state, metrics = step(state, self._next(data, number))
                pending.append(metrics)
                self._report(number)
                saves = number % self.config.save_every == 0 or number == last
                if number % self.config.log_every and not saves:
                    continue
                record = self._mean(pending, number)
                record["seconds_per_step"] = (time.perf_counter() - began) / len(pending)
                pending = []
                place = self._write(record)
                if saves:
                    self.save(state)
                    if evaluate is not None:  # may take long: a run that is stopped meanwhile goes on after this record
                        record |= {name: float(value) for name, value in evaluate(state).items()}
                        self._write(record, place)
                began = time.perf_counter()
                records.append(_finite(record))
                values = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
                _log.info("%s: step %d of %d: %s", self.folder.absolute().name, number, last, values)
        except KeyboardInterrupt:
            name = self.folder.absolute().name
            _log.warning(
                "%s: stopped at step %d. Of the checkpoints, %s; %s", name, number, self._have(), self._again()
            )
            raise
        picture = self.folder / "curve.png"
        with _writing(picture):
            draw_curve(records, picture)
        return state

    def _report(self, step: int) -> None:
        if self._progress is not None:
            self._progress(Progress(step, self.config.steps))

    def _next(self, data: Iterator[Any], number: int) -> Any:
        try:
            return next(data)
        except StopIteration:
            raise TrainingError(
                f"the data ended before step {number} of {self.config.steps}; give more, or fewer steps"
            ) from None
        except (OSError, RuntimeError) as error:  # raised by the disk, and by libsndfile
            raise TrainingError(
                f"the batch of step {number} could not be read ({error}); fix that, then {self._again()}. "
                f"Of the checkpoints, {self._have()}"
            ) from error

    def _mean(self, pending: Sequence[Metrics], number: int) -> dict[str, float]:
        values = jax.device_get(list(pending))
        for at, one in enumerate(values, number - len(values) + 1):
            if not one["finite"]:
                raise TrainingError(
                    f"the loss or its gradient is not finite at step {at} (loss {float(one['loss'])}); that step was "
                    f"not taken. Lower the learning rate, or look at that batch, then {self._again()}. Of the "
                    f"checkpoints, {self._have()}"
                )
        names = ["loss", *(name for name in values[0] if name not in ("loss", "finite"))]
        return {"step": number} | {name: float(np.mean([one[name] for one in values])) for name in names}

    def _read_records(self, step: int) -> list[Record]:
        """Read the records up to a step, and remove later ones from the file."""
        records = []
        for _, line in files.json_lines(self._metrics.read_bytes()) if self._metrics.exists() else ():
            # A full disk may have truncated a line, or a hand have written one.
            with contextlib.suppress(ValueError, TypeError, LookupError):
                if (record := files.decode_json(line))["step"] <= step:
                    records.append(record)
        with _writing(self._metrics):
            files.write_text(self._metrics, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def _write(self, record: Mapping[str, float], place: int | None = None) -> int:
        """Append a record to the file, or write it in the place of the last one; return its place."""
        with _writing(self._metrics), self._metrics.open("ab" if place is None else "r+b") as file:
            place = file.seek(0, os.SEEK_END) if place is None else file.seek(place)
            file.write(json.dumps(_finite(record)).encode() + b"\n")
        return place


def fit(
    run: Run,
    optimizer: OptimizerConfig,
    loss: Loss,
    measure: Callable[[Any, Any, Any], Metrics],
    params: Any,
    rows: Any,
    *,
    batch_size: int,
    seed: int,
    resume: bool,
    frozen: Any = (),
    aux: Any = (),
) -> TrainState:
    """Train parameters on rows to the last step of a run, and evaluate them at each checkpoint.

    Args:
      run: the run, which saves the training.
      optimizer: settings of the optimizer.
      loss: loss function, as for `step.make_step`.
      measure: jittable function from `params, frozen, aux` to metrics on rows that are not trained on.
      params: initial parameters; donated.
      rows: training rows, as for `data.batches`.
      batch_size: rows in a batch.
      seed: seed of the order of the rows, and of the random numbers in the loss.
      resume: whether to continue from the last checkpoint, if there is one.
      frozen: parameters that the loss only reads; donated, and returned in the state.
      aux: initial auxiliary state of the loss; donated.

    Returns:
      The state after the last step, which has been saved.

    Raises:
      TrainingError: a loss is not finite, or a checkpoint cannot be written or resumed from.
    """
    update = optimizer.build(run.config.steps)
    state = init(params, update, seed, frozen=frozen, aux=aux)
    state = run.restore(state) if resume and run.latest() is not None else state
    jitted = jax.jit(measure)

    def evaluate(state: TrainState) -> dict[str, float]:
        metrics = jitted(state.params, state.frozen, state.aux)
        return {f"validation_{name}": float(value) for name, value in metrics.items()}

    data = batches(rows, batch_size=batch_size, seed=seed, first_step=int(state.step))
    return run.train(make_step(loss, update), state, data, evaluate=evaluate)


def _finite(record: Mapping[str, float]) -> Record:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def _faults(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the differences in shape and dtype between the arrays of a checkpoint and the expected ones."""
    found, expected = (
        {name: f"{np.dtype(a.dtype).name} {list(a.shape)}" for name, a in arrays.items()} for arrays in (saved, wanted)
    )
    return [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(found | expected)
        if found.get(name) != expected.get(name)
    ]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror}); fix that, then continue with --resume"
        ) from error
