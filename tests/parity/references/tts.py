"""Text to speech by the reference package: checkpoints with random weights, voices, and what `TTSModel` makes of them.

Dimensions: K streams (text first), F frames, X steps of a voice.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
from moshi.models import loaders
from moshi.models.tts import StateMachine, TokenIds, TTSModel
from safetensors.torch import save_file

from tests.helpers.tokenizer_maker import make_tokenizer
from tests.parity.references.drivers import inference, load_mimi, read_config
from tests.parity.references.kyutai import MIMI_CONFIG_NAME, PUBLISHED, lm_config, lm_shapes, make_mimi, mimi_config
from tests.parity.references.random_weights import random_lm

Kind = Literal["speakers", "prefix"]
VOICE_STEPS = 7

# The published structure in miniature: 8 codebooks, sets of weights shared by the last four steps of the walk.
_SMALL = {
    "dim": 64,
    "num_heads": 4,
    "num_layers": 2,
    "context": 30,
    "card": 128,
    "n_q": 8,
    "dep_q": 8,
    "delays": [0, 0] + [2] * 7,
    "text_card": 64,
    "depformer_dim": 32,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_dim_feedforward": 96,
    "depformer_low_rank_embeddings": 16,
    "depformer_weights_per_step_schedule": [0, 1, 2, 3, 4, 4, 4, 4],
    "mimi_config_name": MIMI_CONFIG_NAME,
    "moshi_name": "model.safetensors",
    "tts_config": {"audio_delay": 0.4, "second_stream_ahead": 2},
}
_CONDITIONERS = {
    "speaker_wavs": {"type": "tensor", "tensor": {"dim": 16}},
    "cfg": {
        "type": "lut",
        "lut": {"n_bins": 3, "dim": 16, "tokenizer": "noop", "possible_values": ["1.0", "1.5", "2.0"]},
    },
    "control": {"type": "lut", "lut": {"n_bins": 1, "dim": 64, "tokenizer": "noop", "possible_values": ["ok"]}},
}


@dataclass(frozen=True)
class Spoken:
    """The reference's outputs for one script.

    Attributes:
        frames_KF: Text as fed to the model, then codes, delays undone; int32, up to the row's own last step.
        consumed: Step at which each entry was taken.
        transcript: Words, and the step of each.
        end_step: Step at which the script ended; None if it did not.
    """

    frames_KF: np.ndarray
    consumed: list[int]
    transcript: list[tuple[str, int]]
    end_step: int | None


@dataclass(frozen=True)
class How:
    """Settings of `TTSModel`, as it names them; temperature 0."""

    cfg_coef: float = 1.0
    cfg_is_no_text: bool = True
    cfg_is_no_prefix: bool = True
    padding_bonus: float = 0.0
    padding_between: int = 0
    n_q: int = 8
    max_gen_length: int = 400
    machine: dict[str, int] = field(default_factory=dict)


def tts_config(kind: Kind) -> dict[str, Any]:
    """Content of `config.json`: the published keys with small values; or of a model that goes on from a prefix."""
    config = json.loads((PUBLISHED / "tts-1.6b-en_fr.config.json").read_text()) | _SMALL
    if kind == "speakers":
        return config | {"conditioners": _CONDITIONERS}
    return config | {
        "conditioners": {"control": _CONDITIONERS["control"]},
        "cross_attention": False,
        "fuser": {"sum": ["control"], "prepend": [], "cross": []},
        "text_card_out": 5,
    }


def make_kyutai_tts(folder: Path, *, kind: Kind = "speakers", seed: int = 0) -> Path:
    """Write a checkpoint of a model that speaks, as Kyutai publishes one, with random weights; return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tts_config(kind)
    # A copy, as the package adds keys of its own to the conditioners that it is given.
    shapes = lm_shapes(copy.deepcopy(config))
    save_file(random_lm(shapes, config["n_q"], torch.float32), folder / config["moshi_name"])
    make_mimi(folder / config["mimi_name"], seed=seed)
    (folder / MIMI_CONFIG_NAME).write_text(json.dumps(mimi_config(published=False), indent=1))
    make_tokenizer(folder / config["tokenizer_name"], config["text_card"])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def make_voice(path: Path, seed: int, steps: int = VOICE_STEPS, width: int = 16) -> Path:
    """Write a voice as Kyutai publishes them: `speaker_wavs` [1, width, X]."""
    voice = torch.randn((1, width, steps), generator=torch.Generator().manual_seed(seed))
    save_file({"speaker_wavs": voice}, path)
    return path


def load_tts(folder: Path, how: How) -> TTSModel:
    """Return the reference's model, float32 on the CPU, at temperature 0."""
    config = read_config(folder)
    lm = loaders.get_moshi_lm(
        folder / config.get("moshi_name", "model.safetensors"), lm_config(config), dtype=torch.float32
    )
    machine = StateMachine(
        token_ids=TokenIds(lm.text_card + 1),
        second_stream_ahead=config["tts_config"]["second_stream_ahead"],
        **({"max_padding": 8, "initial_padding": 2} | how.machine),
    )
    return TTSModel(
        lm=lm,
        mimi=load_mimi(folder),
        tokenizer=sentencepiece.SentencePieceProcessor(str(folder / config["tokenizer_name"])),
        voice_suffix="",
        voice_repo="",
        machine=machine,
        delay_steps=int(config["tts_config"]["audio_delay"] * 12.5),
        temp=0.0,
        cfg_coef=how.cfg_coef,
        n_q=how.n_q,
        max_gen_length=how.max_gen_length,
        padding_bonus=how.padding_bonus,
    )


def moshi_speech(
    folder: Path,
    scripts: Sequence[Sequence[str]],
    how: How = How(),
    *,
    voices: Sequence[Sequence[Path]] | None = None,
    cfg: float | None = None,
    prefixes: Sequence[np.ndarray] | None = None,
) -> tuple[list[Spoken], np.ndarray]:
    """Greedy speech of several scripts in one batch.

    Args:
        folder: From `make_kyutai_tts`.
        scripts: Turns of each row.
        how: Settings.
        voices: Files for each row.
        cfg: Condition of models with distilled guidance.
        prefixes: Codes [Q, P] for each row that the model goes on from.

    Returns:
        What was said of each script, and the samples of all rows [B, S] as `moshi.run_tts` decodes them, until the
        last row has ended.
    """
    model = load_tts(folder, how)
    entries = [model.prepare_script(script, padding_between=how.padding_between) for script in scripts]
    attributes = [
        model.make_condition_attributes(list(voices[row]) if voices else [], cfg_coef=cfg)
        for row in range(len(scripts))
    ]
    given = None
    if prefixes is not None:
        given = [torch.from_numpy(np.concatenate([np.full_like(p[:1], -1), p]).astype(np.int64)) for p in prefixes]
    with inference():
        result = model.generate(
            entries,
            attributes,
            prefixes=given,
            cfg_is_no_text=how.cfg_is_no_text,
            cfg_is_no_prefix=how.cfg_is_no_prefix,
        )
        with model.mimi.streaming(len(scripts)):
            codes = [frame[:, 1 : 1 + how.n_q] for frame in result.frames[model.delay_steps :]]
            pcm = torch.cat([model.mimi.decode(c).clip(-1, 1) for c in codes], -1)[:, 0].numpy()
    frames_BKF = torch.cat(result.frames, -1).numpy().astype(np.int32)
    longest = max(model.lm.delays)
    spoken = []
    for row, end in enumerate(result.end_steps):
        steps = how.max_gen_length if end is None else end + model.delay_steps + model.final_padding
        spoken.append(
            Spoken(
                frames_BKF[row, : 1 + how.n_q, : steps - longest],
                result.all_consumption_times[row],
                result.all_transcripts[row],
                end,
            )
        )
    return spoken, pcm
