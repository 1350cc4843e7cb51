"""CSM held against transformers, and against a plain reader of Sesame's own layout, on small random checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CsmForConditionalGeneration

import dsm_jax
from dsm_jax import checkpoints
from dsm_jax.checkpoints import Model
from dsm_jax.convert import convert, transformers_csm
from dsm_jax.errors import CheckpointError
from dsm_jax.models.csm import CsmLM
from tests.helpers.checkpoint_maker import assert_same_weights, copy_of
from tests.parity.references import csm as reference
from tests.parity.references import speech
from tests.parity.references import transformers_csm as made
from tests.parity.references.sesame_csm import sesame_csm_logits

SEEDS = (0, 1, 2)
FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
# Logits are of deviation 3 and reach 10, where float32 has steps of 1e-6. Each rounds sums of a hundred products in
# another order, through two layers and norms that divide by small values: 1.5e-5 was seen.
ROUNDING = 1e-4


def conversation(folder) -> np.ndarray:
    """Return the tokens [M, T] of two turns with real speech, each with its frame of zeros, and of the next text."""
    zeros_Q1 = np.zeros((reference.NUM_CODEBOOKS, 1), np.int32)
    turns = []
    for text, start in (("[1]mister quilter", 0), ("[0]and more", 30)):
        codes_QT = reference.transformers_csm_context(folder, speech("librispeech")[start * 1920 : (start + 24) * 1920])
        turns += [reference.text_tokens(reference.csm_ids(folder, text)), reference.audio_tokens(codes_QT)]
        turns.append(reference.audio_tokens(zeros_Q1))
    return np.concatenate([*turns, reference.text_tokens(reference.csm_ids(folder, reference.ENDS))], axis=1)


def our_logits(model: Model, tokens_MT: np.ndarray, lm: CsmLM | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher-forced logits of both decoders; those of the depth decoder at frames of audio only."""
    graph, params = nnx.split(lm or model.lm)
    out = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, jnp.asarray(tokens_MT)[None])
    depth_TQV = np.where(tokens_MT[1][:, None, None] >= 0, out.depth_logits_BTQV[0], 0)
    return np.asarray(out.first_logits_BTV[0]), depth_TQV


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", ["transformers", "sesame"])
def test_logits_of_both_decoders_equal_transformers(tmp_path, seed, layout):
    folder, source = made(seed), made(seed)
    if layout == "sesame":
        convert(source, tmp_path / "sesame", to="sesame")
        folder = tmp_path / "sesame"
    tokens_MT = conversation(source)
    wanted = reference.transformers_csm_logits(source, tokens_MT)
    for found, expected in zip(our_logits(checkpoints.load(folder), tokens_MT), wanted, strict=True):
        assert expected.std() > 1
        np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_sesames_layout_is_read_by_torchtunes_names_and_arithmetic(tmp_path, seed):
    convert(made(seed), tmp_path / "sesame", to="sesame")
    tokens_MT = conversation(made(seed))
    wanted = reference.transformers_csm_logits(made(seed), tokens_MT)
    for found, expected in zip(sesame_csm_logits(tmp_path / "sesame", tokens_MT), wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("backbone", {"rope_scaling": None}),
        ("depth", {"rope_scaling": None}),
        ("backbone", {"norm": "rms_norm_f32"}),
        ("depth", {"norm": "rms_norm_f32"}),
    ],
    ids=["unscaled backbone", "unscaled depth", "epsilon of the backbone", "epsilon of depth"],
)
def test_the_checkpoint_tells_a_wrong_setting(part, change):
    model, tokens_MT = checkpoints.load(made(0)), conversation(made(0))
    config = model.config.csm
    wrong = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)})
    lm = nnx.merge(nnx.split(CsmLM(wrong, rngs=nnx.Rngs(0)))[0], model.lm_params)
    wanted = reference.transformers_csm_logits(made(0), tokens_MT)
    differ = [np.abs(f - e).max() for f, e in zip(our_logits(model, tokens_MT, lm), wanted, strict=True)]
    assert differ[0 if part == "backbone" else 1] > 200 * ROUNDING


def test_the_codec_inside_gives_transformers_codes_of_whole_frames():
    pcm_S = speech("librispeech")[: 30 * 1920]
    codes_QT = np.asarray(dsm_jax.encode(checkpoints.load(made(0)), pcm_S))
    wanted_QT = reference.transformers_csm_context(made(0), pcm_S)
    assert len(np.unique(wanted_QT)) > 50
    np.testing.assert_array_equal(codes_QT, wanted_QT)


def test_several_files_are_one_model(tmp_path):
    folder = copy_of(made(0), tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    CsmForConditionalGeneration.from_pretrained(made(0)).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    assert_same_weights(checkpoints.load(folder), checkpoints.load(made(0)))


@pytest.mark.parametrize("path", [(), ("sesame",), ("orbax",), ("sesame", "orbax")])
def test_transformers_loads_an_export_with_equal_tensors(tmp_path, path):
    folder = made(0)
    for to in (*path, "transformers"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    load = CsmForConditionalGeneration.from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert {kind: list(info[kind]) for kind in FAULTS} == {kind: [] for kind in FAULTS}
    tied = model.backbone_model.embed_tokens.embed_audio_tokens.weight
    assert tied is model.depth_decoder.model.embed_tokens.weight
    original = load(made(0), dtype=torch.float32)
    wanted = original.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, tensor in model.state_dict().items():
        if "codebook." not in name:  # theirs are sums and counts, ours quotients and ones
            assert torch.equal(tensor, wanted[name]), name
    ours, theirs = (m.config.to_dict() for m in (model, original))
    for config in (ours, theirs):
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        for key in ("architectures", "_frame_rate", "frame_rate"):  # the rate is given or derived
            config["codec_config"].pop(key, None)
    assert ours == theirs
    assert model.codec_model.config.frame_rate == original.codec_model.config.frame_rate
    assert model.generation_config.to_diff_dict() == original.generation_config.to_diff_dict()


@pytest.mark.parametrize("path", [(), ("sesame",), ("orbax",)])
def test_transformers_processor_of_an_export_is_the_original(tmp_path, path):
    folder = made(0)
    for to in (*path, "transformers"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    pcm_S = speech("librispeech")[:20_000]
    chat = [
        {"role": "1", "content": [{"type": "text", "text": "Good day"}, {"type": "audio", "audio": pcm_S}]},
        {"role": "0", "content": [{"type": "text", "text": "And to you!"}]},
    ]
    ours, theirs = (reference.csm_inputs(f, [chat, chat[1:]], output_labels=True) for f in (folder, made(0)))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.BEGIN, reference.END)
    assert tokenizer("[0]Hi", add_special_tokens=True)["input_ids"] == reference.csm_ids(made(0), "[0]Hi")


def test_an_export_speaks_as_the_original(tmp_path):
    convert(made(0), tmp_path / "sesame", to="sesame")
    convert(tmp_path / "sesame", tmp_path / "out", to="transformers")
    pcm_S = speech("librispeech")[:20_000]
    chat = [
        {"role": "1", "content": [{"type": "text", "text": "Good day"}, {"type": "audio", "audio": pcm_S}]},
        {"role": "0", "content": [{"type": "text", "text": "And to you!"}]},
    ]
    for ours, theirs in zip(
        *(reference.transformers_csm_talk(f, [chat], 8) for f in (tmp_path / "out", made(0))), strict=True
    ):
        np.testing.assert_array_equal(ours[0], theirs[0])


def test_a_file_that_holds_the_shared_table_twice_is_read_and_a_wrong_copy_is_not(tmp_path):
    folder = copy_of(made(0), tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    depth, backbone = transformers_csm.SHARED
    assert depth in tensors
    assert backbone not in tensors  # as transformers writes it
    save_file(tensors | {backbone: tensors[depth].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert_same_weights(checkpoints.load(folder), checkpoints.load(made(0)))
    save_file(tensors | {backbone: tensors[depth] + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="are one table of the model, but their values differ"):
        checkpoints.load(folder)
