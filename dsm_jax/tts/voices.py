"""Read voices, and make the conditions of a model from voices and guidance.

A published voice is a file with `speaker_wavs` [1, C, X]: X steps (125 for 10 s) of an embedding of C numbers, made by
Kyutai's own encoder, which is not published. Models without that conditioner go on from a recording instead.

Shape letters: B batch rows, X steps of a voice, C its width, S slots.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/tts.py:TTSModel.make_condition_attributes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsm_jax.audio import SupportsArray
from dsm_jax.checkpoints import Model
from dsm_jax.configs import LMConfig, LutConditioner, TensorConditioner
from dsm_jax.convert.files import own_voices
from dsm_jax.errors import CheckpointError, SpeechError
from dsm_jax.hub import fetch_file

VOICES = "kyutai/tts-voices"  # where voices are found by name
SLOTS = 5  # speakers that a model can be told of; the first two speak
WAVS, GUIDANCE, CONTROL = "speaker_wavs", "cfg", "control"

Voice = str | os.PathLike[str] | SupportsArray  # see `read_voice`


def voices_of(model: Model) -> dict[str, Path]:
    """Return the voices that came with a model, by name: files in a folder `voices` beside its tokenizer."""
    return {path.stem: path for path in own_voices(model.tokenizer and model.tokenizer.path)}


def write_voices(folder: Path, voices: Mapping[str, np.ndarray]) -> None:
    """Write voices [X, C] to a folder, each to a file of its name, as Kyutai publishes them."""
    folder.mkdir(exist_ok=True)
    for name, steps_XC in voices.items():
        (folder / f"{name}.safetensors").write_bytes(save({WAVS: np.ascontiguousarray(steps_XC.T[None])}))


def read_voice(voice: Voice, model: Model) -> np.ndarray:
    """Return the steps [X, C] of a voice, float32.

    Args:
      voice: a safetensors file, the name of one of the model's own voices or of those that Kyutai has published
        (`expresso/….wav`), or an array [X, C], such as `blend` returns.
      model: that is to speak with it: a published voice has a file for each.

    Raises:
      CheckpointError: a name that is neither, a file that is not a voice, or one that cannot be fetched.
      SpeechError: numbers of another shape, or not finite.
    """
    if not isinstance(voice, str | os.PathLike):
        steps_XC = np.asarray(voice)
    else:
        own, model_id = voices_of(model), model.config.model_id
        path = own.get(str(voice), Path(voice).expanduser())
        if not os.path.isfile(path):  # says no to names that pathlib raises at
            local = path.suffix == ".safetensors" or path.is_absolute() or os.path.isdir(path)
            if local or model_id is None:
                known = f", or one of the model's own: {', '.join(own)}" if own else ""
                raise CheckpointError(f"the voice {path} is not a file; give a voice's safetensors file{known}")
            path = fetch_file(VOICES, f"{voice}.{model_id.sig}@{model_id.epoch}.safetensors")
        steps_XC = _read(path)
    numbers = np.issubdtype(steps_XC.dtype, np.floating)
    if not numbers or steps_XC.ndim != 2 or not steps_XC.size or not np.isfinite(steps_XC).all():
        what = f"the voice {voice}" if isinstance(voice, str | os.PathLike) else "the voice given"
        raise SpeechError(f"{what} is {steps_XC.dtype} {list(steps_XC.shape)}; expected finite numbers [steps, width]")
    return steps_XC.astype(np.float32)


def _read(path: Path) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            found = file.get_tensor(WAVS) if WAVS in names else None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); a voice is one, made for the model; models that go on from a "
            "recording have no speakers"
        ) from None
    if found is None or found.ndim != 3 or found.shape[0] != 1:
        shape = "" if found is None else f" of shape {list(found.shape)}"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""  # a model given by mistake has hundreds
        raise CheckpointError(f"{path} holds {names[:3]}{more}{shape}; a voice holds {WAVS} [1, width, steps]")
    return found[0].T


def blend(voices: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Return a voice between voices: the mean of their steps, by weights that need not add up to 1.

    Raises:
      SpeechError: none were given, their shapes differ, or the weights are not as many, or negative, or all 0.
    """
    weights = [1.0] * len(voices) if weights is None else weights
    shapes = sorted({voice.shape for voice in voices})
    if len(shapes) != 1:
        raise SpeechError(f"voices to blend have the shapes {shapes}; give voices of one shape")
    if len(weights) != len(voices) or not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise SpeechError(f"{len(voices)} voices have the weights {list(weights)}; give one each, 0 or more, not all 0")
    return np.average(np.stack(voices), axis=0, weights=weights).astype(np.float32)


def guidance_values(config: LMConfig) -> list[float]:
    """Return the guidance that a model with distilled guidance can be told; none for one without."""
    conditioner = config.conditioner(GUIDANCE)
    known = conditioner.possible_values if isinstance(conditioner, LutConditioner) else None
    return [float(value) for value in known or ()]


def has_speakers(config: LMConfig) -> bool:
    """Tell whether the model takes voices of its speakers as a condition."""
    return config.conditioner(WAVS) is not None


def positions(voices: Sequence[np.ndarray]) -> int:
    """Return how many positions the voices of a request take, which has as many slots of one length as the model."""
    return SLOTS * max((len(voice) for voice in voices), default=0)


def conditions(
    config: LMConfig, voices: Sequence[Sequence[np.ndarray]], guidance: float | None, *, room: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Make the values and masks for `lm.condition`.

    Args:
      config: of the language model.
      voices: of each row, the steps [X, C] of its voices, the main speaker's first.
      guidance: for models with distilled guidance, one of `guidance_values`; None leaves it out.
      room: positions of the voices, those after a row's own being empty; None takes what the longest row needs.

    Returns:
      Values and masks by conditioner, and how many positions each row has, int32 [B].

    Raises:
      SpeechError: a row without a voice or with too many, voices of several lengths in a row or of another width, or
        guidance that the model does not know.
    """
    room = max(map(positions, voices), default=0) if room is None else room
    values, masks = absent(config, len(voices), room)
    length_B = np.zeros(len(voices), np.int32)
    for conditioner in config.conditioners:
        value, mask = values[conditioner.name], masks[conditioner.name]
        if isinstance(conditioner, TensorConditioner):
            for row, given in enumerate(voices):
                value_XC, mask_X = _slots(given, conditioner.dim)
                length_B[row] = len(value_XC)
                value[row, : len(value_XC)], mask[row, : len(value_XC)] = value_XC, mask_X
        elif (index := _index(conditioner, guidance)) is not None:
            value[:], mask[:] = index, True
    return values, masks, length_B


def absent(config: LMConfig, rows: int, room: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Make the values and masks of rows to which no condition is given, with some positions of voices."""
    values, masks = {}, {}
    for conditioner in config.conditioners:
        name = conditioner.name
        if isinstance(conditioner, TensorConditioner):
            values[name] = np.zeros((rows, room, conditioner.dim), np.float32)
            masks[name] = np.zeros((rows, room), bool)
        else:
            values[name] = np.full((rows, 1), conditioner.n_bins, np.int32)
            masks[name] = np.zeros((rows, 1), bool)
    return values, masks


def with_unconditional(
    values: Mapping[str, jax.Array], masks: Mapping[str, jax.Array], config: LMConfig
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Add as many rows to which no condition is given: what classifier-free guidance is measured against."""
    rows, room = next(iter(masks.values())).shape[0], masks[WAVS].shape[1] if WAVS in masks else 0
    none_values, none_masks = absent(config, rows, room)
    return (
        {name: jnp.concatenate([value, none_values[name]]) for name, value in values.items()},
        {name: jnp.concatenate([mask, none_masks[name]]) for name, mask in masks.items()},
    )


def _index(conditioner: LutConditioner, guidance: float | None) -> int | None:
    """Return the entry of a conditioner's table for a row; None for no condition."""
    known = conditioner.possible_values or ()
    if conditioner.name == CONTROL:
        return known.index("ok")
    if conditioner.name != GUIDANCE or guidance is None:
        return None
    if guidance not in (numbers := [float(value) for value in known]):
        raise SpeechError(f"the guidance is {guidance}; this model knows {', '.join(known)}")
    return numbers.index(guidance)


def _slots(given: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay the voices of a request end to end in its slots, [S * X, C], and mark the slots that are filled."""
    if not 1 <= len(given) <= SLOTS:
        raise SpeechError(f"a request has {len(given)} voices; this model needs 1 to {SLOTS}: give a voice")
    lengths = sorted({len(voice) for voice in given})
    if len(lengths) > 1:
        raise SpeechError(f"the voices of a request are {lengths} steps long; give voices of one length")
    if wrong := sorted({voice.shape[1] for voice in given} - {width}):
        raise SpeechError(f"a voice is {wrong[0]} numbers wide; this model's are {width}: take one made for it")
    value_SXC = np.zeros((SLOTS, lengths[0], width), np.float32)
    mask_SX = np.zeros((SLOTS, lengths[0]), bool)
    value_SXC[: len(given)], mask_SX[: len(given)] = given, True
    return value_SXC.reshape(-1, width), mask_SX.reshape(-1)
