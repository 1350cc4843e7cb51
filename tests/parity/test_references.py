"""The references answer as the parity tests assume: their codes and tokens vary, every weight counts, and they agree.

Dimensions: S samples, Q codebooks, T frames.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rustymimi
import sentencepiece
import torch
from moshi.client_utils import RawPrinter
from moshi.models.loaders import CheckpointInfo
from moshi.run_inference import InferenceState
from safetensors.torch import load_file
from transformers import MimiModel

from tests.parity import references
from tests.parity.references.kyutai import lm_shapes
from tests.parity.references.random_weights import random_lm
from tests.parity.references.transformers_layout import mimi_state

FRAME = 1920
RING_FRAMES = 125  # Mimi's 250 steps of attention, two to a frame


def recording(clip: str) -> np.ndarray:
    """At most 20 s of a recording: longer than any attention window here."""
    return references.speech(clip)[: 250 * FRAME]


def padded(clip: str) -> np.ndarray:
    """Return a recording with the silence that `run_inference` adds, cut to full frames."""
    stt_config = references.read_config(references.kyutai_stt())["stt_config"]
    pcm_S = references.moshi_pad(recording(clip), stt_config)
    return pcm_S[: len(pcm_S) // FRAME * FRAME]


def fed_tokens(folder: Path, codes_QT: np.ndarray) -> np.ndarray:
    """Every token of a run, with the one that the very first step gives."""
    run = references.moshi_tokens(folder, codes_QT)
    return np.array([run.first_token, *run.tokens_T])


def listing(name: str) -> dict[str, tuple[int, ...]]:
    rows = (references.PUBLISHED / f"{name}.tensors.tsv").read_text().splitlines()
    return {key: tuple(map(int, shape.split("x"))) for key, _, shape in (row.split("\t") for row in rows)}


@pytest.fixture(scope="module")
def published_mimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds a codec of the published shape, and no language model."""
    folder = tmp_path_factory.mktemp("published")
    config = references.stt_config("stt-1b")
    references.make_mimi(folder / config["mimi_name"], published=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# What the makers write.


@pytest.mark.parametrize("size, name", [("stt-1b", "stt-1b-en_fr"), ("stt-2.6b", "stt-2.6b-en")])
def test_the_reference_has_the_published_language_model_parameters(size: references.Size, name: str):
    shapes = lm_shapes(references.stt_config(size))
    spelled = {key.replace("in_projs.0.weight", "in_proj_weight"): shape for key, shape in shapes.items()}
    assert {key.replace("out_projs.0", "out_proj"): shape for key, shape in spelled.items()} == listing(name)


def test_a_small_folder_holds_the_published_names_and_the_published_config_keys():
    folder = references.kyutai_stt()
    config = references.read_config(folder)
    lm, mimi = load_file(folder / "model.safetensors"), load_file(folder / config["mimi_name"])
    assert lm.keys() < listing("stt-1b-en_fr").keys()
    assert mimi.keys() < listing("mimi").keys()
    assert config.keys() - references.stt_config("stt-1b").keys() == {"mimi_config_name"}


def test_pause_heads_join_the_same_model_and_the_other_spelling_holds_the_same_tensors():
    plain, heads, respelled = (
        load_file(folder / "model.safetensors")
        for folder in (
            references.kyutai_stt(),
            references.kyutai_stt(extra_heads=True),
            references.kyutai_stt(spelling="in_projs"),
        )
    )
    added = {name: tuple(heads[name].shape) for name in heads.keys() - plain.keys()}
    assert added == {f"extra_heads.{head}.weight": (6, 64) for head in range(4)}
    assert all(torch.equal(heads[name], tensor) for name, tensor in plain.items())
    assert "transformer.layers.0.self_attn.in_projs.0.weight" in respelled
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), respelled.values(), strict=True))


def test_a_parameter_without_a_known_scale_is_refused():
    with pytest.raises(
        ValueError, match=r"found the parameter adapter\.0\.weight, expected one of a model of the family"
    ):
        random_lm({"adapter.0.weight": (4, 4)}, 8, torch.float32)


# What the models say.


@pytest.mark.parametrize("clip, entries", [("librispeech", 40), ("bria", 65)])
def test_every_codebook_uses_many_entries_and_follows_the_sound(clip: str, entries: int):
    codes_QT = references.moshi_codes(references.kyutai_stt(), padded(clip))
    assert min(len(set(row_T)) for row_T in codes_QT) >= entries
    assert (codes_QT[:, 1:] != codes_QT[:, :-1]).mean(axis=1).min() > 0.6


@pytest.mark.parametrize("clip", ["librispeech", "bria"])
def test_words_word_starts_and_padding_all_occur(clip: str):
    folder = references.kyutai_stt(extra_heads=True)
    run = references.moshi_tokens(folder, references.moshi_codes(folder, padded(clip)))
    assert len(set(run.tokens_T) - {0, 1, 2, 3}) >= 20
    for token in (0, 3):
        assert 0.1 < (run.tokens_T == token).mean() < 0.4
    assert run.logits_TV.shape == (len(run.tokens_T), 64)
    assert run.logits_TV.argmax(axis=1).tolist() == run.tokens_T.tolist()
    assert run.pauses_TH.shape == (len(run.tokens_T), 4)
    assert run.pauses_TH.std(axis=0).min() > 0.1


def test_no_parameter_of_the_codec_is_idle():
    mimi = references.load_mimi(references.kyutai_stt())
    pcm = torch.from_numpy(recording("librispeech")[: 6 * FRAME])[None, None]

    def answer() -> list[torch.Tensor]:
        for layer in mimi.modules():
            if hasattr(layer, "_embedding"):
                layer._embedding = None  # what the reference derives from sum and usage, and keeps
        codes = mimi.encode(pcm)
        return [mimi.encode_to_latent(pcm, quantize=False), codes, mimi.decode(codes)]

    assert idle_parameters(mimi, answer) == {name for name in mimi.state_dict() if name.endswith("_initialized")}


def test_no_parameter_of_the_language_model_is_idle():
    folder = references.kyutai_stt(extra_heads=True)
    lm = references.load_lm(folder)
    codes_QT = references.moshi_codes(folder, padded("librispeech"))
    run = references.moshi_tokens(folder, codes_QT)
    inputs = torch.from_numpy(np.concatenate([run.tokens_T[None], codes_QT]))[None].long()

    def answer() -> list[torch.Tensor]:
        hidden, logits = lm.forward_text(inputs)
        return [logits, *(head(hidden) for head in lm.extra_heads)]

    assert idle_parameters(lm, answer) == set()


def idle_parameters(model: torch.nn.Module, answer: Callable[[], list[torch.Tensor]]) -> set[str]:
    """Return names of the tensors that can change without changing the answer."""
    idle = set()
    with references.inference():
        before = answer()
        for name, tensor in model.state_dict().items():
            kept = tensor.clone()
            tensor.copy_(tensor.flatten().flip(0).view_as(tensor) * 1.5)
            after = answer()
            tensor.copy_(kept)
            if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                idle.add(name)
    return idle


# Where the references agree, and where they do not.


def test_the_driver_gives_the_text_that_run_inference_prints():
    folder = references.kyutai_stt()
    config = references.read_config(folder)
    tokenizer = sentencepiece.SentencePieceProcessor(str(folder / config["tokenizer_name"]))
    info = CheckpointInfo(
        folder / "model.safetensors",
        folder / config["mimi_name"],
        folder / config["tokenizer_name"],
        model_type="stt",
        stt_config=config["stt_config"],
    )
    mimi, lm = references.load_mimi(folder), references.load_lm(folder)
    state = InferenceState(info, mimi, tokenizer, lm, 1, 1.0, "cpu", **config["lm_gen_config"])
    printed = io.StringIO()
    state.printer = RawPrinter(printed, io.StringIO())
    with references.inference():
        state.run(torch.from_numpy(references.speech("librispeech"))[None, None])

    codes_QT = references.moshi_codes(folder, padded("librispeech"), streaming=True)
    pieces = [
        tokenizer.id_to_piece(int(t)) for t in references.moshi_tokens(folder, codes_QT).tokens_T if t not in (0, 3)
    ]
    assert printed.getvalue() == "".join(pieces).replace("▁", " ")


def test_moshi_encodes_a_stream_as_a_clip_until_its_ring_is_full_and_not_after():
    folder = references.kyutai_stt()
    pcm_S = padded("bria")
    differs_T = (references.moshi_codes(folder, pcm_S) != references.moshi_codes(folder, pcm_S, streaming=True)).any(0)
    # From then on the first of a frame's two steps attends to 249 steps, because the second has overwritten the oldest.
    assert not differs_T[:RING_FRAMES].any()
    assert differs_T[RING_FRAMES:].any()


def test_moshi_decodes_a_stream_as_a_clip():
    folder = references.kyutai_stt()
    codes_QT = references.moshi_codes(folder, padded("librispeech"))
    clip_S = references.moshi_decode(folder, codes_QT)
    assert 0.05 < clip_S.std() < 0.5
    np.testing.assert_allclose(references.moshi_decode(folder, codes_QT, streaming=True), clip_S, atol=1e-5)


@pytest.mark.parametrize("clip", ["librispeech", "bria"])
def test_transformers_gives_the_same_codes_and_the_same_tokens(clip: str):
    kyutai, transformers = references.kyutai_stt(), references.transformers_stt()
    codes_QT = references.moshi_codes(kyutai, padded(clip))
    np.testing.assert_array_equal(references.transformers_codes(transformers, padded(clip)), codes_QT)
    # `generate` counts the token of the very first step, so the last frame is never used.
    tokens_T = references.transformers_tokens(transformers, recording(clip))
    np.testing.assert_array_equal(tokens_T, fed_tokens(kyutai, codes_QT)[:-1])


@pytest.mark.parametrize("clip", ["librispeech", "bria"])
def test_transformers_with_the_released_window_hears_the_first_frame_twice(clip: str):
    """It does not advance after the first window; its stream is exact beyond 10 s, unlike moshi's."""
    pcm_S = padded(clip)
    codes_QT = references.moshi_codes(references.kyutai_stt(), np.concatenate([pcm_S[:FRAME], pcm_S]))
    tokens_T = references.transformers_tokens(references.transformers_stt(), recording(clip), 1)
    np.testing.assert_array_equal(tokens_T, fed_tokens(references.kyutai_stt(), codes_QT)[: len(tokens_T)])


def test_transformers_pads_each_layer_so_only_a_partial_last_frame_differs():
    pcm_S = references.speech("librispeech")
    assert len(pcm_S) % FRAME != 0
    ours_QT = references.moshi_codes(references.kyutai_stt(), pcm_S)
    theirs_QT = references.transformers_codes(references.transformers_stt(), pcm_S)
    assert np.flatnonzero((ours_QT != theirs_QT).any(axis=0)).tolist() == [ours_QT.shape[1] - 1]


def test_shards_hold_the_same_weights_as_one_file():
    whole, sharded = references.transformers_stt(), references.transformers_stt(max_shard_size="400KB")
    places = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 2
    tensors = load_file(whole / "model.safetensors")
    assert places.keys() == tensors.keys()
    shards = {name: load_file(sharded / name) for name in set(places.values())}
    assert all(torch.equal(shards[places[name]][name], tensor) for name, tensor in tensors.items())


def test_the_codec_alone_in_transformers_layout_gives_the_same_codes(tmp_path: Path):
    folder = references.make_transformers_mimi(references.kyutai_stt(), tmp_path)
    pcm_S = padded("librispeech")
    with references.inference():
        codes = MimiModel.from_pretrained(folder).encode(torch.from_numpy(pcm_S)[None, None]).audio_codes
    np.testing.assert_array_equal(codes[0], references.moshi_codes(references.kyutai_stt(), pcm_S))


def test_a_tensor_that_transformers_has_no_place_for_is_refused():
    with pytest.raises(ValueError, match=r"found the tensor quantiser\.weight, expected a name of a published file"):
        mimi_state({"quantiser.weight": torch.zeros(1)}, {})


def test_the_published_codec_varies_and_the_rust_loader_reads_it_plain_and_weight_normed(
    published_mimi: Path, tmp_path: Path
):
    name = references.read_config(published_mimi)["mimi_name"]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(published_mimi / name).items()}
    assert shapes == listing("mimi")
    pcm_S = padded("librispeech")[: 50 * FRAME]
    codes_QT = references.moshi_codes(published_mimi, pcm_S)
    assert min(len(set(row_T)) for row_T in codes_QT) >= 20
    # The Python package of the Rust codec always gives eight codebooks.
    np.testing.assert_array_equal(references.rusty_codes(published_mimi, pcm_S), codes_QT[:8])

    normed = references.make_weight_normed_mimi(published_mimi / name, tmp_path / "normed.safetensors")
    keys = load_file(normed).keys()
    assert {"encoder.model.0.conv.conv.weight_g", "decoder.model.2.convtr.convtr.weight_v"} <= keys
    normed_QT = rustymimi.Tokenizer(str(normed)).encode(pcm_S[None, None])[0]
    assert (normed_QT == codes_QT[:8]).mean() > 0.98  # rounding of g v / |v| may move a near tie
