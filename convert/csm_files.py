"""The tokenizer of CSM, its control tokens by name, and the files of transformers' processor.

Sesame's own code takes Llama 3.2's tokenizer, in which the two tokens that stand for audio in transformers' prompts are
reserved ones; the tokenizer of the published repository has names for them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsm_jax.configs import CsmConfig, MimiConfig
from dsm_jax.convert import files
from dsm_jax.errors import CheckpointError
from dsm_jax.files import read_text
from dsm_jax.tokenizers import copy_tokenizer

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_SAMPLING = {  # as published
    "depth_decoder_do_sample": True,
    "depth_decoder_temperature": 0.9,
    "depth_decoder_top_k": 50,
    "do_sample": True,
    "max_new_tokens": 125,
    "temperature": 0.9,
}
# Names of the control tokens: transformers' processor looks for the last two.
AUDIO, AUDIO_END = "<|AUDIO|>", "<|audio_eos|>"


def end_id(path: Path) -> int:
    """Return the token that ends the text of a turn: the `eos_token` of the tokenizer's settings.

    Args:
      path: a folder in transformers' layout.

    Raises:
      CheckpointError: a file is missing, or does not say which token it is.
    """
    for name in (TOKENIZER, _SETTINGS):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; fetch the whole repository again")
    token = files.read_json(path / _SETTINGS).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    tokens = _control_tokens(files.read_json(path / TOKENIZER), path / TOKENIZER)
    found = [i for i, name in tokens.items() if name == token]
    if not found:
        raise CheckpointError(
            f"{path / _SETTINGS} has the eos_token {token!r}, which is no control token of {TOKENIZER}; fetch both "
            "again"
        )
    return found[0]


def sampling_notes(path: Path) -> tuple[str, ...]:
    """Return a remark on the settings of sampling in a folder that are not the published ones: they are not kept."""
    found = files.read_json(path / _GENERATION) if (path / _GENERATION).is_file() else {}
    known = _SAMPLING | {"top_k": 50}  # transformers' default
    lost = [f"{key} {found[key]!r}" for key in known if found.get(key) not in (None, known[key])]
    return (f"{_GENERATION} has {', '.join(lost)}, not kept: give it as an option of speech",) if lost else ()


def write(source: Path | None, csm: CsmConfig, mimi: MimiConfig, folder: Path, name: str) -> None:
    """Write the tokenizer and the processor's files, so that `AutoProcessor.from_pretrained` loads the folder.

    Args:
      source: the model's `tokenizer.json`.
      csm: config of the language model.
      mimi: config of the codec.
      folder: the folder to write to.
      name: name of the model, for the error.

    Raises:
      CheckpointError: there is no `tokenizer.json`, or it lacks a control token of the model.
    """
    source = _checked(source, name)
    values = files.read_json(source)
    wanted = {csm.audio_id: AUDIO, csm.audio_end_id: AUDIO_END}
    tokens = _control_tokens(values, source)
    if missing := [i for i in (csm.begin_id, csm.end_id, *wanted) if i not in tokens]:
        raise CheckpointError(
            f"the tokenizer of {name} has no control tokens with the ids {missing}; use the one that was published "
            "with the weights"
        )
    begin, end = tokens[csm.begin_id], tokens[csm.end_id]
    named = {i: tokens[i] for i in wanted} == wanted
    text = read_text(source) if named else _as_published(values, csm)
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    special = {"bos_token": begin, "eos_token": end, "pad_token": end}
    settings = {
        "clean_up_tokenization_spaces": True,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131_072,
        "processor_class": "CsmProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    contents = {
        _SETTINGS: special | settings,
        "special_tokens_map.json": {key: {"content": token} | plain for key, token in special.items()},
        "preprocessor_config.json": {
            "chunk_length_s": None,
            "feature_extractor_type": "EncodecFeatureExtractor",
            "feature_size": mimi.channels,
            "overlap": None,
            "padding_side": "right",
            "padding_value": 0.0,
            "processor_class": "CsmProcessor",
            "return_attention_mask": True,
            "sampling_rate": mimi.sample_rate,
        },
        _GENERATION: {"bos_token_id": csm.begin_id, "pad_token_id": csm.audio_id} | _SAMPLING,
    }
    for file, content in contents.items():
        files.write_json(folder / file, content)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")


def copy(source: Path | None, folder: Path, name: str) -> None:
    """Copy the tokenizer to a folder, with its settings if there are any.

    Args:
      source: the model's `tokenizer.json`.
      folder: the folder to write to.
      name: name of the model, for the error.

    Raises:
      CheckpointError: there is no `tokenizer.json`.
    """
    copy_tokenizer(_checked(source, name), folder, TOKENIZER)


def _checked(source: Path | None, name: str) -> Path:
    if source is None or source.suffix != ".json":
        found = "missing" if source is None else source.name
        raise CheckpointError(
            f"the tokenizer of {name} is {found}; expected {TOKENIZER}, as published with the weights"
        )
    return source


def _control_tokens(values: Mapping[str, Any], path: Path) -> dict[int, str]:
    try:
        return {token["id"]: token["content"] for token in values.get("added_tokens", []) if token["special"]}
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path} has added_tokens that are no list of objects with id, content and special; fetch it again"
        ) from None


def _as_published(values: dict[str, Any], csm: CsmConfig) -> str:
    """Return Llama's tokenizer with names for the two reserved tokens, ending a text as it begins one."""
    from tokenizers import Tokenizer, processors

    names = {csm.audio_id: AUDIO, csm.audio_end_id: AUDIO_END}
    added = [token | {"content": names.get(token["id"], token["content"])} for token in values["added_tokens"]]
    tokenizer = Tokenizer.from_str(json.dumps(values | {"added_tokens": added}))
    (begin, _), (end, _) = around = [(tokenizer.id_to_token(i), i) for i in (csm.begin_id, csm.end_id)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=around)
    return tokenizer.to_str(pretty=True)


# As published, to the byte.
_TEMPLATE = """
{%- for message in messages %}
    {#-- Validate role is a stringified integer --#}
    {%- if not message['role'] is string or not message['role'].isdigit() %}
        {{- raise_exception("The role must be an integer or a stringified integer (e.g. '0') designating the speaker id") }}
    {%- endif %}

    {#-- Validate content is a list --#}
    {%- set content = message['content'] %}
    {%- if content is not iterable or content is string %}
        {{- raise_exception("The content must be a list") }}
    {%- endif %}

    {#-- Collect content types --#}
    {%- set content_types = content | map(attribute='type') | list %}
    {%- set is_last = loop.last %}

    {#-- Last message validation --#}
    {%- if is_last %}
        {%- if 'text' not in content_types %}
            {{- raise_exception("The last message must include one item of type 'text'") }}
        {%- elif (content_types | select('equalto', 'text') | list | length > 1) or (content_types | select('equalto', 'audio') | list | length > 1) %}
            {{- raise_exception("At most two items are allowed in the last message: one 'text' and one 'audio'") }}
        {%- endif %}

    {#-- All other messages validation --#}
    {%- else %}
        {%- if content_types | select('equalto', 'text') | list | length != 1
              or content_types | select('equalto', 'audio') | list | length != 1 %}
            {{- raise_exception("Each message (except the last) must contain exactly one 'text' and one 'audio' item") }}
        {%- elif content_types | reject('in', ['text', 'audio']) | list | length > 0 %}
            {{- raise_exception("Only 'text' and 'audio' types are allowed in content") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}

{%- for message in messages %}
    {{- bos_token }}
    {{- '[' + message['role'] + ']' }}
    {{- message['content'][0]['text'] }}
    {{- eos_token }}
    {%- if message['content']|length > 1 %}
        {{- '<|AUDIO|><|audio_eos|>' }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501
