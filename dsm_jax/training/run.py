"""One training run in one folder: steps, progress, metrics, checkpoints, and a picture at the end.

A run's folder holds `metrics.jsonl` (one object per logged step), `checkpoints/` (Orbax, the last few) and `curve.png`.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsm_jax.errors import ConfigError, TrainingError
from dsm_jax.memory import set_pieces_aside
from dsm_jax.training.report import bar, draw_curve
from dsm_jax.training.step import Metrics, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Row = Mapping[str, Any]  # of metrics: numbers, and None for what is not finite, which JSON has no number for


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is, and how often it reports and saves."""

    steps: int
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    keep: int = 2  # checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a run is {getattr(self, name)}; give 1 or more")


class Run:
    """A run's folder.

    Args:
      folder: made if it is not there.
      config: of the run.

    Raises:
      TrainingError: the folder cannot be made.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder, self.config = folder, config
        self._checkpoints = (folder / "checkpoints").absolute()
        self._metrics = folder / "metrics.jsonl"
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{folder} cannot be made ({error.strerror}); choose another folder") from None

    def latest(self) -> int | None:
        """The step of the last checkpoint; None where there is none."""
        return max(self._saved(), default=None)

    def _saved(self) -> list[int]:
        # Orbax gives a checkpoint its name once it is whole; until then there is more to its name than the number.
        return sorted(int(p.name) for p in self._checkpoints.glob("*") if p.name.isdecimal())

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint, whole or not at all, then removes those that are too many.

        Raises:
          TrainingError: it cannot be written, or is there already; those before it are still there.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        try:
            self._clear()  # what a run that was killed left behind
            size, free = sum(a.nbytes for a in jax.tree.leaves(state)), shutil.disk_usage(self._checkpoints).free
            if free < size:
                raise OSError(f"it needs {size / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free")
            with _without_log(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._checkpoints / str(step), state)
        except Exception as error:  # of the disk, through whatever Orbax uses
            self._clear()
            # The file system's words come last: Orbax and tensorstore put theirs, and long names, in front.
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2] or type(error).__name__
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {self._checkpoints} ({reason.strip()}); "
                f"{self._have()}. Put that right, then go on with --resume"
            ) from error
        for old in self._saved()[: -self.config.keep]:
            # By another name first: a removal that is cut short must not leave what looks whole.
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

    def restore(self, like: TrainState) -> TrainState:
        """The last checkpoint.

        Args:
          like: a state of the same run, for its structure and placement.

        Raises:
          TrainingError: there is none, it is of another run, or it is damaged.
        """
        import orbax.checkpoint as ocp

        step = self.latest()
        if step is None:
            raise TrainingError(f"{self.folder} holds no checkpoint to resume from; start without --resume")
        folder = self._checkpoints / str(step)
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)), like
        )
        try:
            with _without_log(), ocp.StandardCheckpointer() as checkpointer:
                held = checkpointer.metadata(folder).item_metadata
                if held is None:
                    raise ValueError("it does not say what it holds")
                faults = _faults(ocp.tree.to_flat_dict(held.tree, sep="."), ocp.tree.to_flat_dict(target, sep="."))
                # What does not fit is not left to Orbax, which casts some of it.
                state = None if faults else checkpointer.restore(folder, target)
        except Exception as error:  # Orbax raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"{folder} cannot be read ({reason}); remove it to resume from the one before"
            ) from error
        if state is None:
            more = f", and {len(faults) - 1} more" if faults[1:] else ""
            raise TrainingError(
                f"{folder} does not fit this run ({faults[0]}{more}); resume with the config that it was made with"
            )
        return state

    def train(
        self,
        step: Step,
        state: TrainState,
        data: Iterator[Any],
        *,
        evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    ) -> TrainState:
        """Runs to the last step.

        Args:
          step: from `make_step`.
          state: before the first step, or restored; the run takes it over.
          data: batches, from the step that `state` is at.
          evaluate: further figures, at each checkpoint.

        Returns:
          The state after the last step; it has been saved.

        Raises:
          TrainingError: a loss that is not finite, a batch that cannot be read, a checkpoint or metrics that cannot be
            written, or a folder that another run has got further in.
        """
        first, last = int(state.step), self.config.steps
        if (saved := self.latest()) is not None and saved > first:
            raise TrainingError(
                f"{self.folder} holds a checkpoint of step {saved}, and this run would begin at step {first}; go on "
                "from there with --resume, or choose another folder"
            )
        rows = self._kept_rows(first)
        held: list[Metrics] = []
        began = time.perf_counter()
        with bar(self.folder.absolute().name, last, first) as report:
            for number in range(first + 1, last + 1):
                state, metrics = step(state, self._next(data, number))
                held.append(metrics)
                if number == first + 1:
                    set_pieces_aside()  # of compiling the step
                saves = number % self.config.save_every == 0 or number == last
                if number % self.config.log_every and not saves:
                    continue
                row = self._mean(held, number)
                row["seconds_per_step"] = (time.perf_counter() - began) / len(held)
                held = []
                if saves:
                    self.save(state)
                    row |= {name: float(value) for name, value in (evaluate(state) if evaluate else {}).items()}
                    if number - first <= self.config.save_every:
                        set_pieces_aside()  # of compiling `evaluate`
                began = time.perf_counter()
                rows.append({name: value if math.isfinite(value) else None for name, value in row.items()})
                self._append(rows[-1])
                report(row)
        picture = self.folder / "curve.png"
        with _writing(picture):
            draw_curve(rows, picture)
        return state

    def _next(self, data: Iterator[Any], number: int) -> Any:
        try:
            return next(data)
        except StopIteration:
            raise TrainingError(
                f"the data ended before step {number} of {self.config.steps}; give more, or fewer steps"
            ) from None
        except (OSError, RuntimeError) as error:  # of the disk, of libsndfile
            raise TrainingError(
                f"the batch of step {number} could not be read ({error}); put that right, then go on with --resume. "
                f"Of the checkpoints, {self._have()}"
            ) from error

    def _mean(self, held: Sequence[Metrics], number: int) -> dict[str, float]:
        values = jax.device_get(list(held))
        for at, one in enumerate(values, number - len(values) + 1):
            if not one["finite"]:
                raise TrainingError(
                    f"the loss or its gradient is not finite at step {at} (loss {float(one['loss'])}); that step was "
                    "not taken. Lower the learning rate, or look at that batch, then go on with --resume. Of the "
                    f"checkpoints, {self._have()}"
                )
        names = ["loss", *(name for name in values[0] if name not in ("loss", "finite"))]
        return {"step": number} | {name: float(np.mean([one[name] for one in values])) for name in names}

    def _kept_rows(self, step: int) -> list[Row]:
        """The rows up to a step; the file has only them from now on."""
        rows = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a full disk cut off
                rows.append(json.loads(line))
        rows = [row for row in rows if row["step"] <= step]
        new = self._metrics.with_suffix(".new")
        with _writing(self._metrics):
            new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            new.replace(self._metrics)
        return rows

    def _append(self, row: Row) -> None:
        with _writing(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _faults(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint and the state that it is for, by the names of the arrays."""
    found, expected = (
        {name: f"{np.dtype(a.dtype).name} {list(a.shape)}" for name, a in arrays.items()} for arrays in (held, wanted)
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
            f"{path} could not be written ({error.strerror}); put that right, then go on with --resume"
        ) from error


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keeps Orbax from logging each of its threads' tracebacks; the error itself is raised all the same."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)
