"""Makes small random checkpoints of CSM with transformers, and runs transformers on them.

Weights are drawn so that greedy codes vary, and are then taught, by the smallest change of the heads, to end the speech
of two prompts. The residual stream is small, so that the norms' epsilon matters, and both rotary scalings begin within
a prompt. Tokens are [M, T] as in `dsm_jax.models.csm`, text first, -1 absent.

Dimensions: M streams, Q codebooks, T positions or frames, V codes, E and D widths of the backbone and depth decoder,
N states.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoProcessor,
    CsmConfig,
    CsmForConditionalGeneration,
    CsmProcessor,
    EncodecFeatureExtractor,
    GenerationConfig,
    MimiModel,
    PreTrainedTokenizerFast,
)
from transformers.models.csm import CsmDepthDecoderConfig

from tests.helpers.tokenizer_maker import make_byte_tokenizer
from tests.parity.references.drivers import inference
from tests.parity.references.kyutai import PUBLISHED, mimi_config
from tests.parity.references.random_weights import random_mimi
from tests.parity.references.transformers_layout import loaded, mimi_state, transformers_mimi_config

NUM_CODEBOOKS, CODEC_CARD, CARD = 8, 64, 67
TEXT_CARD = 304
BEGIN, END, AUDIO, AUDIO_END = range(TEXT_CARD - 4, TEXT_CARD)
TOKENS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "audio": "<|AUDIO|>", "audio_eos": "<|audio_eos|>"}
# The speech of the first prompt ends; that of the second has a frame of zeros but for its last code on the way.
ENDS = "[0]Hello there."
ENDS_LATER = "[1]Good morning."
END_FRAME, NEARLY_END_FRAME, LATER_END_FRAME = 7, 3, 9
_LAST_CODE = 5  # of the frame that is zeros but for its last code
_CLEAR = 2.0  # margin of a taught code, in the logits' own unit

_BACKBONE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_codebooks": NUM_CODEBOOKS,
    "vocab_size": CARD,
    "codebook_pad_token_id": CARD - 1,
    "text_vocab_size": TEXT_CARD,
    "bos_token_id": BEGIN,
    "pad_token_id": AUDIO,  # as published
    "audio_token_id": AUDIO,
    "audio_eos_token_id": AUDIO_END,
}
_DEPTH = {
    "hidden_size": 64,
    "backbone_hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NUM_CODEBOOKS + 1,
    "num_codebooks": NUM_CODEBOOKS,
    "vocab_size": CARD,
}
_TOKENIZER = {
    "bos_token": TOKENS["bos"],
    "eos_token": TOKENS["eos"],
    "pad_token": TOKENS["eos"],  # as published
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
_GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
_SMALL = 0.01  # deviation of what enters the residual stream, whose variance is then near the norms' epsilon of 1e-5
_GAINS = {  # deviation of a matrix's output for inputs of deviation 1
    "q_proj": 1.3,  # attention logits of deviation 1.7: neither uniform nor one-hot
    "k_proj": 1.3,
    "v_proj": 1.0,
    "o_proj": 2 * _SMALL,
    "gate_proj": 1.0,
    "up_proj": 1.0,
    "down_proj": 3 * _SMALL,
    "lm_head": 3.0,
    "inputs_embeds_projector": 1.0,
}


def make_transformers_csm(folder: Path, *, seed: int = 0) -> Path:
    """Write a small random CSM checkpoint with its processor, as transformers' `save_pretrained` does.

    Args:
        folder: Created if it is missing.
        seed: Of the weights.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codec = mimi_config(published=False)
    codec["quantizer"] |= {"bins": CODEC_CARD, "n_q": NUM_CODEBOOKS}
    mimi = mimi_state(random_mimi(codec, NUM_CODEBOOKS, seed).state_dict(), codec)
    config = CsmConfig(
        **_BACKBONE,
        rope_parameters=_rope(8),
        depth_decoder_config=CsmDepthDecoderConfig(**_DEPTH, rope_parameters=_rope(4)).to_dict(),
        codec_config=transformers_mimi_config(codec).to_dict(),
    )
    model = CsmForConditionalGeneration(config).eval()
    codec_model = loaded(MimiModel, transformers_mimi_config(codec), mimi, folder)
    model.codec_model.load_state_dict(codec_model.state_dict())
    tokenizer_path = make_byte_tokenizer(folder / "tokenizer.json", TEXT_CARD, [*TOKENS.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_path), **_TOKENIZER)
    with inference():
        _draw(model, seed)
        _teach_endings(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN, pad_token_id=AUDIO, do_sample=True, temperature=0.9, max_new_tokens=125
    )
    model.depth_decoder.generation_config = GenerationConfig(do_sample=True, temperature=0.9, top_k=50)
    model.save_pretrained(folder)
    template = (PUBLISHED / "csm-1b.chat_template.jinja").read_text()
    CsmProcessor(EncodecFeatureExtractor(), tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def csm_ids(folder: Path, text: str) -> list[int]:
    """Return the token ids of "[0]some text", with the tokens that begin and end a text."""
    return _ids(_processor(folder).tokenizer, text)


def text_tokens(ids: Sequence[int]) -> np.ndarray:
    """Return positions of text [M, T]."""
    tokens_MT = np.full((1 + NUM_CODEBOOKS, len(ids)), -1, np.int32)
    tokens_MT[0] = ids
    return tokens_MT


def audio_tokens(codes_QT: np.ndarray) -> np.ndarray:
    """Return positions of frames of audio [M, T]."""
    return np.concatenate([np.full((1, codes_QT.shape[1]), -1, np.int32), codes_QT]).astype(np.int32)


def transformers_csm_codes(folder: Path, prompts: Sequence[np.ndarray], max_frames: int) -> list[np.ndarray]:
    """Generate greedily from one batch of prompts, given as tokens.

    Args:
        folder: What `make_transformers_csm` wrote.
        prompts: Tokens [M, T] of each row, of any length; padded on the left.
        max_frames: Limit of frames.

    Returns:
        Codes [Q, T] of each row, int32, with the ending frame; rows go on until the last has ended.
    """
    model = _model(folder)
    embedded = [_embedded(model, _batch(tokens_MT)) for tokens_MT in prompts]
    length = max(e.shape[1] for e in embedded)
    left = [length - e.shape[1] for e in embedded]
    inputs = torch.cat([torch.nn.functional.pad(e, (0, 0, n, 0)) for e, n in zip(embedded, left, strict=True)])
    mask = torch.stack([(torch.arange(length) >= n).long() for n in left])
    with inference():
        codes = model.generate(inputs_embeds=inputs, attention_mask=mask, max_new_tokens=max_frames, **_GREEDY)
    return [row.T.astype(np.int32) for row in codes.numpy()]


def transformers_csm_talk(
    folder: Path, conversations: Sequence[list[dict[str, Any]]], max_frames: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Generate greedily from one batch of conversations in the chat format, with recordings.

    Args:
        folder: What `make_transformers_csm` wrote.
        conversations: Messages `{"role": "0", "content": [{"type": "text", ...}, {"type": "audio", "audio": pcm}]}`.
        max_frames: Limit of frames.

    Returns:
        Codes [Q, T] of each row, int32, with the ending frame, and the sound of each row, float32 [samples].
    """
    inputs = csm_inputs(folder, conversations)
    with inference():
        found = _model(folder).generate(
            **inputs, max_new_tokens=max_frames, output_audio=True, return_dict_in_generate=True, **_GREEDY
        )
    return [row.T.astype(np.int32) for row in found.sequences.numpy()], [sound.numpy() for sound in found.audio]


def csm_inputs(folder: Path, conversations: Sequence[list[dict[str, Any]]], **settings: Any) -> dict[str, torch.Tensor]:
    """Return the processor's output for conversations, as `CsmForConditionalGeneration` takes it.

    Args:
        folder: What `make_transformers_csm` wrote.
        conversations: Messages of each row.
        settings: Of the processor's call: `output_labels`, `depth_decoder_labels_ratio`.
    """
    processor = AutoProcessor.from_pretrained(folder)  # anew, as its second call would fail after a save
    return dict(
        processor.apply_chat_template(list(conversations), tokenize=True, return_dict=True, processor_kwargs=settings)
    )


def transformers_csm_context(folder: Path, pcm_S: np.ndarray) -> np.ndarray:
    """Return the codes [Q, T], int32, that transformers makes of a recording in the context."""
    with inference():
        pcm = torch.from_numpy(np.asarray(pcm_S, np.float32))[None, None]
        return _model(folder).codec_model.encode(pcm).audio_codes[0].numpy().astype(np.int32)


def transformers_csm_logits(folder: Path, tokens_MT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute teacher-forced logits of both decoders over one conversation.

    Returns:
        The backbone's [T, V], where t predicts the first code of position t + 1; and the depth decoder's [T, Q - 1, V],
        where t predicts the codes after the first of position t, zeros where that is no frame of audio. Float32.
    """
    model = _model(folder)
    codes_TQ = torch.from_numpy(np.array(tokens_MT[1:].T)).long()
    frames = (codes_TQ[:, 0] >= 0).nonzero()[:, 0]
    with inference():
        hidden_TE = _hidden(model, _batch(tokens_MT))[0]
        depth_TQV = torch.zeros(len(codes_TQ), NUM_CODEBOOKS - 1, CARD)
        ids_NQ = torch.nn.functional.pad(codes_TQ[frames, :-1], (1, 0))
        out = model.depth_decoder(input_ids=ids_NQ, backbone_last_hidden_state=hidden_TE[frames - 1])
        depth_TQV[frames] = out.logits
        return model.lm_head(hidden_TE).numpy(), depth_TQV.numpy()


def transformers_csm_margin(folder: Path, prompt_MT: np.ndarray, codes_QT: np.ndarray) -> float:
    """Return the smallest difference between the best two logits in all codes of a greedy answer to a prompt."""
    start, length = prompt_MT.shape[1], codes_QT.shape[1]
    whole_MT = np.concatenate([prompt_MT, audio_tokens(codes_QT)], axis=1)
    first_TV, depth_TQV = transformers_csm_logits(folder, whole_MT)
    logits_TQV = np.concatenate([first_TV[start - 1 : start - 1 + length, None], depth_TQV[start:]], axis=1)
    assert np.array_equal(logits_TQV.argmax(-1).T, codes_QT), "the codes are not the greedy answer"
    best_TQ2 = np.sort(logits_TQV, axis=-1)[..., -2:]
    return float(np.diff(best_TQ2).min())


def transformers_csm_losses(
    folder: Path, tokens_BMT: np.ndarray, labels_BTQ: np.ndarray, num_items_in_batch: int | None = None
) -> tuple[float, float]:
    """Compute both losses from codes.

    Args:
        folder: What `make_transformers_csm` wrote.
        tokens_BMT: Padded on the right with -1, which nothing before it sees.
        labels_BTQ: -100 where nothing is learnt: everywhere at text, and after the first code of frames that only the
            backbone learns.
        num_items_in_batch: As transformers' `Trainer` gives it; None: means.

    Returns:
        The backbone's loss and the depth decoder's.
    """
    model = _model(folder)
    with inference():
        out = model(
            inputs_embeds=_embedded(model, torch.from_numpy(np.array(tokens_BMT)).long()),
            labels=torch.from_numpy(np.array(labels_BTQ)).long(),
            num_items_in_batch=num_items_in_batch,
        )
    return float(out.backbone_loss), float(out.depth_decoder_loss)


def transformers_csm_chat_losses(inputs: dict[str, torch.Tensor], folder: Path) -> tuple[float, float]:
    """Compute both losses from what `csm_inputs` made with `output_labels`."""
    with inference():
        out = _model(folder)(**inputs)
    return float(out.backbone_loss), float(out.depth_decoder_loss)


def _rope(original: int) -> dict[str, Any]:
    """Return Llama 3's scaling; a head of 16 has rates that it keeps, that it divides, and between, in a prompt."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 0.125,
        "high_freq_factor": 0.5,
        "original_max_position_embeddings": original,
    }


@functools.cache
def _model(folder: Path) -> CsmForConditionalGeneration:
    return CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@functools.cache
def _processor(folder: Path) -> CsmProcessor:
    return AutoProcessor.from_pretrained(folder)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [BEGIN, *tokenizer(text, add_special_tokens=False)["input_ids"], END]


def _batch(tokens_MT: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(tokens_MT)).long()[None]


def _embedded(model: CsmForConditionalGeneration, tokens_BMT: torch.Tensor) -> torch.Tensor:
    """Return embeddings [B, T, E]: of the text, or the sum of the codes'; a position has one or the other, or none."""
    text_BT, codes_BTQ = tokens_BMT[:, 0], tokens_BMT[:, 1:].transpose(1, 2)
    with inference():
        text_BTE = model.embed_text_tokens(text_BT.clamp(min=0)) * (text_BT >= 0)[..., None]
        audio_BTE = model.backbone_model.embed_tokens(codes_BTQ.clamp(min=0)) * (codes_BTQ[..., 0] >= 0)[..., None]
        return text_BTE + audio_BTE


def _hidden(model: CsmForConditionalGeneration, tokens_BMT: torch.Tensor) -> torch.Tensor:
    return model.backbone_model(inputs_embeds=_embedded(model, tokens_BMT), use_cache=False).last_hidden_state


def _draw(model: CsmForConditionalGeneration, seed: int) -> None:
    """Draw every parameter of both decoders; codes that the codec has not got are never the likeliest."""
    for name, parameter in model.named_parameters():
        if name.startswith("codec_model."):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        normal = torch.randn(parameter.shape, generator=generator)
        gain = next((gain for part, gain in _GAINS.items() if part in name), None)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * normal)
        elif "embed_text_tokens" in name:
            parameter.copy_(2 * _SMALL * normal)
        elif "embed_tokens" in name:
            parameter.copy_(_SMALL * normal)
        elif "codebooks_head" in name:
            parameter.copy_(3.0 / math.sqrt(parameter.shape[1]) * normal)
            parameter[:, :, CODEC_CARD:] *= 0.1
        elif gain is not None:
            parameter.copy_(gain / math.sqrt(parameter.shape[1]) * normal)
        else:
            raise ValueError(f"found the parameter {name}, expected one of CSM: give it a gain here")
    model.lm_head.weight[CODEC_CARD:] *= 0.1


def _teach_endings(model: CsmForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Change the heads so that two prompts end, and keep every logit of the frames before that the change concerns."""
    seen: list[list[torch.Tensor]] = [[] for _ in range(NUM_CODEBOOKS)]
    for text, endings in (
        (ENDS, {END_FRAME: [0] * NUM_CODEBOOKS}),
        (
            ENDS_LATER,
            {NEARLY_END_FRAME: [0] * (NUM_CODEBOOKS - 1) + [_LAST_CODE], LATER_END_FRAME: [0] * NUM_CODEBOOKS},
        ),
    ):
        tokens = text_tokens(_ids(tokenizer, text))
        for frame in range(max(endings) + 1):
            hidden_E = _hidden(model, _batch(tokens))[0, -1]
            codes: list[int] = []
            for q in range(NUM_CODEBOOKS):
                state = hidden_E if q == 0 else _depth_state(model, hidden_E, codes)
                head = model.lm_head.weight.T if q == 0 else model.depth_decoder.codebooks_head.weight[q - 1]
                if frame in endings:
                    _raise(head, state, endings[frame][q], seen[q])
                codes.append(int((state @ head).argmax()))
                seen[q].append(state)
            if codes != endings.get(frame, codes):
                raise ValueError(f"frame {frame} of {text!r} is {codes}, expected {endings[frame]}: draw other weights")
            tokens = np.concatenate([tokens, audio_tokens(np.array(codes)[:, None])], axis=1)


def _depth_state(model: CsmForConditionalGeneration, hidden_E: torch.Tensor, codes: list[int]) -> torch.Tensor:
    """Return the depth decoder's normalised state [D] after these codes of a frame."""
    ids = torch.tensor([[0, *codes]])
    return model.depth_decoder.model(
        input_ids=ids, backbone_last_hidden_state=hidden_E[None], use_cache=False
    ).last_hidden_state[0, -1]


def _raise(head_DV: torch.Tensor, state_D: torch.Tensor, code: int, seen: list[torch.Tensor]) -> None:
    """Make a code the likeliest in a state, by the smallest change that keeps its logits in the states seen before."""
    new_D = state_D = state_D.double()  # so that the order of sums does not reach the float32 weights
    if seen:
        seen_ND = torch.stack(seen).double()
        new_D = state_D - seen_ND.T @ torch.linalg.lstsq(seen_ND.T, state_D[:, None]).solution[:, 0]
    logits_V = state_D @ head_DV.double()
    others = torch.cat([logits_V[:code], logits_V[code + 1 :]])
    by = ((others.max() + _CLEAR - logits_V[code]) / (new_D @ state_D)).clamp(min=0)
    head_DV[:, code] += (by * new_D).float()
