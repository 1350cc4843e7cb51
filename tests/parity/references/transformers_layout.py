"""Rewrites a Kyutai folder in transformers' layout with equal weights, and runs transformers' port on it.

The key tables are written from the published key lists and share nothing with the library's converter, so that the
two can be held against each other.

Dimensions: S samples, Q codebooks, T frames, H heads, K half a head's width.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    KyutaiSpeechToTextConfig,
    KyutaiSpeechToTextFeatureExtractor,
    KyutaiSpeechToTextForConditionalGeneration,
    KyutaiSpeechToTextProcessor,
    MimiConfig,
    MimiModel,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import MoshiConverter

from tests.parity.references.drivers import inference, read_config, read_mimi_config
from tests.parity.references.kyutai import published_names

_LM_KEYS = (
    (r"text_linear\.weight", "lm_head.weight"),
    (r"out_norm\.alpha", "model.norm.weight"),
    (r"transformer\.(layers\.\d+)\.norm1\.alpha", r"model.\1.input_layernorm.weight"),
    (r"transformer\.(layers\.\d+)\.norm2\.alpha", r"model.\1.post_attention_layernorm.weight"),
    (r"transformer\.(layers\.\d+)\.gating\.linear_in\.weight", r"model.\1.mlp.fc1.weight"),
    (r"transformer\.(layers\.\d+)\.gating\.linear_out\.weight", r"model.\1.mlp.fc2.weight"),
    (r"transformer\.(layers\.\d+)\.self_attn\.out_proj\.weight", r"model.\1.self_attn.o_proj.linear.weight"),
)
_MIMI_KEYS = (
    (r"(encoder|decoder)\.model\.(\d+)\.conv(?:tr)?\.conv(?:tr)?\.(\w+)", r"\1.layers.\2.conv.\3"),
    (r"(encoder|decoder)\.model\.(\d+\.block\.\d)\.conv\.conv\.(\w+)", r"\1.layers.\2.conv.\3"),
    (r"downsample\.conv\.conv\.conv\.weight", "downsample.conv.weight"),
    (r"upsample\.convtr\.convtr\.convtr\.weight", "upsample.conv.weight"),
    (r"(\w+_transformer)\.transformer\.(layers\.\d+)\.norm1\.(\w+)", r"\1.\2.input_layernorm.\3"),
    (r"(\w+_transformer)\.transformer\.(layers\.\d+)\.norm2\.(\w+)", r"\1.\2.post_attention_layernorm.\3"),
    (r"(\w+_transformer)\.transformer\.(layers\.\d+)\.linear([12])\.weight", r"\1.\2.mlp.fc\3.weight"),
    (r"(\w+_transformer)\.transformer\.(layers\.\d+)\.layer_scale_1\.scale", r"\1.\2.self_attn_layer_scale.scale"),
    (r"(\w+_transformer)\.transformer\.(layers\.\d+)\.layer_scale_2\.scale", r"\1.\2.mlp_layer_scale.scale"),
    (r"(\w+_transformer)\.transformer\.(layers\.\d+)\.self_attn\.out_proj\.weight", r"\1.\2.self_attn.o_proj.weight"),
    (r"quantizer\.rvq_first\.(\w+_proj\.weight)", r"quantizer.semantic_residual_vector_quantizer.\1"),
    (r"quantizer\.rvq_rest\.(\w+_proj\.weight)", r"quantizer.acoustic_residual_vector_quantizer.\1"),
    (r"quantizer\.rvq_first\.vq\.(.+)", r"quantizer.semantic_residual_vector_quantizer.\1"),
    (r"quantizer\.rvq_rest\.vq\.(.+)", r"quantizer.acoustic_residual_vector_quantizer.\1"),
)
_CODEBOOK_KEYS = {"_codebook._initialized": "codebook.initialized", "_codebook.embedding_sum": "codebook.embed_sum"}


def make_transformers_stt(kyutai_folder: Path, folder: Path, *, max_shard_size: str = "50GB") -> Path:
    """Write the `-trfs` twin of a speech-to-text folder: the same weights, a processor and a `tokenizer.json`.

    The generation settings are the released ones: one frame per window, a sliding-window cache, and the text's
    initial token as `bos_token_id`. Pause heads are left out, transformers has none.

    Args:
        kyutai_folder: What `make_kyutai_stt` wrote.
        folder: Created if it is missing.
        max_shard_size: Splits the weights into several files with an index once they exceed it, e.g. "200KB".

    Returns:
        `folder`.

    Raises:
        ValueError: If a tensor has no place in transformers' model, or the model has a parameter without a tensor.
    """
    config = read_config(kyutai_folder)
    state = _lm_state(load_file(kyutai_folder / "model.safetensors"), config)
    codec = mimi_state(load_file(kyutai_folder / config["mimi_name"]), read_mimi_config(kyutai_folder))
    model = loaded(
        KyutaiSpeechToTextForConditionalGeneration,
        _stt_config(config, read_mimi_config(kyutai_folder), state),
        state | {f"codec_model.{name}": tensor for name, tensor in codec.items()},
        folder,
    )
    for settings in (model.generation_config, model.codec_model.generation_config):
        settings._from_model_config = False
    model.generation_config.audio_window_size = 1
    model.generation_config.cache_implementation = "sliding_window"
    model.generation_config.bos_token_id = config["text_card"]
    model.codec_model.generation_config.cache_implementation = "sliding_window"
    model.codec_model.generation_config.use_cache = True
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _processor(kyutai_folder / config["tokenizer_name"], config["stt_config"]).save_pretrained(folder)
    return folder


def make_transformers_mimi(kyutai_folder: Path, folder: Path) -> Path:
    """Write the codec of a Kyutai folder alone, as `MimiModel.save_pretrained` does."""
    config = read_mimi_config(kyutai_folder)
    state = mimi_state(load_file(kyutai_folder / read_config(kyutai_folder)["mimi_name"]), config)
    loaded(MimiModel, transformers_mimi_config(config), state, folder).save_pretrained(folder)
    return folder


def transformers_codes(folder: Path, pcm_S: np.ndarray) -> np.ndarray:
    """Return codes [Q, T], int32, of the whole clip, by the codec inside a `-trfs` folder."""
    with inference():
        return _stt(folder).codec_model.encode(_batch(pcm_S)).audio_codes[0].numpy().astype(np.int32)


def transformers_tokens(folder: Path, pcm_S: np.ndarray, audio_window_frames: int | None = None) -> np.ndarray:
    """Greedy text tokens [T], int32, that `generate` adds after the initial token, for an unpadded clip.

    Args:
        folder: A `-trfs` folder.
        pcm_S: The clip, at 24 kHz; the processor pads it.
        audio_window_frames: Frames that `generate` encodes at a time; None: the whole clip. The released setting is
            1, which encodes the first window twice: see the tests.

    Returns:
        One token per full frame of the padded clip. The last frame has no part in them.
    """
    inputs = KyutaiSpeechToTextProcessor.from_pretrained(folder)(audio=pcm_S, sampling_rate=24_000)
    model = _stt(folder)
    model.generation_config.audio_window_size = audio_window_frames
    with inference():
        return model.generate(**inputs, do_sample=False)[0, 1:].numpy().astype(np.int32)


def mimi_state(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a Kyutai Mimi file's tensors under the names of `kyutai/mimi`, queries and keys permuted.

    Args:
        state: Tensors of a Kyutai Mimi file.
        config: As `moshi.models.loaders.get_mimi` takes it.

    Returns:
        The tensors to save beside a `MimiConfig`.

    Raises:
        ValueError: If a name is in no row of the table.
    """
    target = {}
    for name, tensor in published_names(state).items():
        if name.endswith("self_attn.in_proj_weight"):
            stem = name.removesuffix("in_proj_weight").replace(".transformer.", ".")
            target |= _split_attention(tensor, config["transformer"]["num_heads"], stem + "{}_proj.weight")
            continue
        name = _renamed(name, _MIMI_KEYS)
        for old, new in _CODEBOOK_KEYS.items():
            name = name.replace(old, new)
        target[name.replace("_codebook.", "codebook.")] = tensor
    return target


def _lm_state(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = {name: tensor for name, tensor in published_names(state).items() if not name.startswith("extra_heads.")}
    tables = [state.pop("text_emb.weight"), *(state.pop(f"emb.{index}.weight") for index in range(config["n_q"]))]
    padding = torch.zeros_like(tables[0][:1])
    target = {"model.embed_tokens.embed_tokens.weight": torch.cat([*tables, padding])}
    for name, tensor in state.items():
        if name.endswith("self_attn.in_proj_weight"):
            stem = name.removesuffix("in_proj_weight").replace("transformer.", "model.")
            target |= _split_attention(tensor, config["num_heads"], stem + "{}_proj.linear.weight")
        else:
            target[_renamed(name, _LM_KEYS)] = tensor.flatten() if name.endswith(".alpha") else tensor
    target["lm_head.weight"] = torch.cat([target["lm_head.weight"], padding])
    return target


def _split_attention(packed: torch.Tensor, num_heads: int, name: str) -> dict[str, torch.Tensor]:
    """Query, key and value; a head's interleaved pairs (2k, 2k + 1) become rows k and k + half of the first two."""
    query, key, value = packed.chunk(3)

    def to_halves(weight: torch.Tensor) -> torch.Tensor:
        pairs_HK2D = weight.reshape(num_heads, -1, 2, weight.shape[1])
        return pairs_HK2D.transpose(1, 2).reshape(weight.shape)

    parts = {"q": to_halves(query), "k": to_halves(key), "v": value}
    return {name.format(part): weight.contiguous() for part, weight in parts.items()}


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"found the tensor {name}, expected a name of a published file: add it to the table")


def _stt_config(
    config: dict[str, Any], mimi: dict[str, Any], state: dict[str, torch.Tensor]
) -> KyutaiSpeechToTextConfig:
    num_embeddings = len(state["model.embed_tokens.embed_tokens.weight"])
    return KyutaiSpeechToTextConfig(
        codebook_vocab_size=config["card"] + 1,
        vocab_size=config["text_card"] + 1,
        hidden_size=config["dim"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        max_position_embeddings=2 * config["context"],
        rope_parameters={"rope_type": "default", "rope_theta": config["max_period"]},
        sliding_window=config["context"],
        ffn_dim=len(state["model.layers.0.mlp.fc1.weight"]),
        num_codebooks=config["n_q"],
        audio_bos_token_id=config["card"],
        audio_pad_token_id=num_embeddings - 1,
        bos_token_id=config["text_card"],
        codec_config=transformers_mimi_config(mimi),
    )


def transformers_mimi_config(config: dict[str, Any]) -> MimiConfig:
    """Return the config of a codec, given as `moshi.models.loaders.get_mimi` takes it."""
    seanet, transformer, quantizer = config["seanet"], config["transformer"], config["quantizer"]
    return MimiConfig(
        hidden_size=seanet["dimension"],
        num_filters=seanet["n_filters"],
        upsampling_ratios=seanet["ratios"],
        codebook_size=quantizer["bins"],
        codebook_dim=quantizer["dimension"],
        vector_quantization_hidden_dimension=quantizer["dimension"],
        num_quantizers=quantizer["n_q"],
        upsample_groups=seanet["dimension"],
        num_hidden_layers=transformer["num_layers"],
        intermediate_size=transformer["dim_feedforward"],
        num_attention_heads=transformer["num_heads"],
        num_key_value_heads=transformer["num_heads"],
        sliding_window=transformer["context"],
        rope_parameters={"rope_type": "default", "rope_theta": float(transformer["max_period"])},
    )


def loaded(model_class: Any, config: Any, state: dict[str, torch.Tensor], folder: Path) -> Any:
    """Return the model that `from_pretrained` makes of a config and tensors; refuse missing or unused ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    faults = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    (folder / "model.safetensors").unlink()  # the caller saves again, in as many files as it likes
    if any(faults.values()):
        raise ValueError(f"found {faults} for {model_class.__name__}, expected every tensor to have its place")
    return model


def _processor(tokenizer_path: Path, stt_config: dict[str, float]) -> KyutaiSpeechToTextProcessor:
    pieces = sentencepiece.SentencePieceProcessor(str(tokenizer_path))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=MoshiConverter(str(tokenizer_path)).converted(),
        unk_token=pieces.id_to_piece(0),
        bos_token=pieces.id_to_piece(1),
        eos_token=pieces.id_to_piece(2),
        pad_token=pieces.id_to_piece(3),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return KyutaiSpeechToTextProcessor(KyutaiSpeechToTextFeatureExtractor(**stt_config), tokenizer)


def _stt(folder: Path) -> KyutaiSpeechToTextForConditionalGeneration:
    return KyutaiSpeechToTextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def _batch(pcm_S: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pcm_S, np.float32))[None, None]
