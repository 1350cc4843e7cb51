"""Settings of a server, from the command line, from a file of our own, or from one of moshi-server.

Source of the second form: kyutai-labs/moshi@e6a55d27 rust/moshi-server `main.rs` and its `config-*.toml`.
"""

import dataclasses
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dsm_jax import files
from dsm_jax.configs.json import from_dict
from dsm_jax.errors import ConfigError

ASR_PATH, TTS_PATH = "/api/asr-streaming", "/api/tts_streaming"
_HUB = re.compile(r"hf://([^/]+/[^/@]+)(?:@([^/]+))?/.+")
# A brace that is not closed is part of the name, so that no variable is found.
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<braced>\w+)\}|(?P<plain>\{?\w+))")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]+))?/?")
_OWN_PORTS = {"http": "80", "https": "443"}
_KINDS: Mapping[str, Literal["stt", "tts"]] = {
    "BatchedAsr": "stt",
    "PyBatchedAsr": "stt",
    "Asr": "stt",
    "Py": "tts",
    "Tts": "tts",
}
_FILES = ("lm_model_file", "text_tokenizer_file", "audio_tokenizer_file")
# Keys of moshi-server. Those that are ignored are of its page and its logs, or say what the checkpoint says: the form
# of the model, the first token of a speaker, and the conditions of speech to text, of which published models have none.
_TOP = ("authorized_ids", "modules")
_TOP_IGNORED = ("static_dir", "log_dir", "instance_name")
_MODULE = (
    "type", "path", "batch_size", "temperature", "asr_delay_in_tokens", "log_frequency_s", "py", *_FILES,
)  # fmt: skip
_MODULE_IGNORED = ("model", "text_bos_token", "conditioning_delay", "conditioning_learnt_padding")
_PY = (
    "voice_folder", "default_voice", "cfg_coef", "cfg_is_no_text", "padding_between", "padding_bonus", "n_q", "temp",
)  # fmt: skip
_PY_IGNORED = ("log_folder",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that is served.

    Attributes:
      kind: "stt" or "tts"; conversational speech models are "tts".
      model: name or folder, as `load` takes it.
      slots: sessions at a time; None for 8 on a CPU and 64 elsewhere.
      path: of moshi-server's messages.
      dtype: of the weights; None for the device's own.
      quantize: "int8" rounds the layers' weights; None keeps them.
      revision: branch, tag or commit on the hub; None is its newest.
      temperature: of the sampling; None for the checkpoint's.
      asr_delay_in_tokens: frames by which the text is late, to be checked against the checkpoint; None checks nothing.
      voice_folder: folder of more voices.
      default_voice: name of the voice of clients that name none; None for the first.
      guidance_scale, padding_between, padding_bonus, codebooks: as for `SynthesizeOptions`; None for its defaults.
    """

    kind: Literal["stt", "tts"]
    model: str
    slots: int | None = None
    path: str
    dtype: str | None = None
    quantize: Literal["int8"] | None = None
    revision: str | None = None
    temperature: float | None = None
    asr_delay_in_tokens: int | None = None
    voice_folder: Path | None = None
    default_voice: str | None = None
    guidance_scale: float | None = None
    padding_between: int | None = None
    padding_bonus: float | None = None
    codebooks: int | None = None

    def __post_init__(self) -> None:
        if self.slots is not None and not 1 <= self.slots <= 4096:
            raise ConfigError(f"{self.model} has {self.slots} slots; expected 1 to 4096")
        if not self.path.startswith("/"):
            raise ConfigError(f"the path of {self.model} is {self.path!r}; expected one that begins with /")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
      models: that are served; the first of each kind is the default of the OpenAI dialect and of the page.
      host, port: where to listen.
      keys: keys of clients; empty for none.
      no_auth: let clients in without a key though the host is not loopback.
      origins: web origins whose pages may connect besides the server's own, kept as browsers write them; without keys
        on the loopback, their hosts are also the only names besides the loopback's by which the server may be reached.
      max_session_s: seconds after which a session is ended.
      max_upload_mb: size of an uploaded recording, in 10^6 bytes.
      min_step_ms: milliseconds from one step's start to the next; more gathers more frames into one step.
      drain_s: seconds that running sessions have to end when the server is told to stop.
      idle_s: seconds without audio or text after which a session is ended.
      reserve_live: slots of each model that recordings may not take.
      page, metrics: whether the page and the metrics are there.
      aliases: names of models or voices that clients use, such as "whisper-1", and the names here.
      log_format: "text" or "json".
    """

    models: tuple[ServedModel, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = ()
    no_auth: bool = False
    origins: tuple[str, ...] = ()
    max_session_s: float = 4 * 3600.0
    max_upload_mb: float = 256.0
    min_step_ms: float = 20.0
    drain_s: float = 30.0
    idle_s: float = 120.0
    reserve_live: int = 0
    page: bool = True
    metrics: bool = True
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format is {self.log_format!r}; expected 'text' or 'json'")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"the port is {self.port}; expected a number from 0, which takes a free one, to 65535")
        if any(not key.strip() for key in self.keys):
            raise ConfigError("a key is empty; give keys of some length, or none")
        if not all(key.isascii() for key in self.keys):  # the key itself is not printed
            raise ConfigError("a key has characters beyond ASCII, which no header carries as they are; choose another")
        object.__setattr__(self, "origins", tuple(map(_origin, self.origins)))
        for name in ("max_session_s", "max_upload_mb", "drain_s", "idle_s", "min_step_ms", "reserve_live"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number from 0")
        paths = [model.path for model in self.models]
        if double := sorted({path for path in paths if paths.count(path) > 1}):
            raise ConfigError(f"two models have the path {double[0]}; give each its own")

    def check_access(self) -> None:
        """Refuse to serve without keys where others than this machine can connect.

        Raises:
          ConfigError: the host is not loopback, there is no key, and `no_auth` is not set.
        """
        if not self.keys and not self.no_auth and not is_loopback(self.host):
            raise ConfigError(
                f"the server would listen on {self.host} without keys; give --api-key-file FILE or the variable "
                "DSM_JAX_API_KEYS, or --no-auth if everyone may use it"
            )


def _origin(text: str) -> str:
    """Return an origin as browsers write it: in small letters, without a slash and without the scheme's own port."""
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise ConfigError(f"the origin is {text!r}; expected a scheme and a host alone, such as https://app.example")
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _OWN_PORTS.get(scheme) else "")


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can connect to a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_path(kind: str, number: int) -> str:
    """Return the path of the n-th model of its kind."""
    path = ASR_PATH if kind == "stt" else TTS_PATH
    return path if number == 0 else f"{path}-{number + 1}"


def read_config(path: Path) -> ServerConfig:
    """Read a configuration file, TOML: `[server]` and `[models.NAME]`, or moshi-server's `[modules.NAME]`.

    `$NAME` and `${NAME}` in strings are taken from the environment; `$$` is a `$`.

    Raises:
      ConfigError: the file cannot be read, or holds an unknown key or a value that the server does not support.
    """
    try:
        values = tomllib.loads(files.read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; give the path of a TOML file") from None
    except (OSError, ValueError, RecursionError) as error:  # besides errors of TOML, numbers and depths beyond Python's
        raise ConfigError(f"{path} is not a configuration file ({error}); give a TOML file") from None
    values = _expanded(values)
    if "modules" in values:
        return _of_moshi(values, path)
    if unknown := sorted(values.keys() - {"server", "models"}):
        raise ConfigError(f"{path}: unknown tables {unknown}; expected [server] and [models.NAME]")
    counts = {"stt": 0, "tts": 0}
    models = []
    for name, table in _tables(values, "models", path).items():
        where = f"{path}: models.{name}"
        kind = table.get("kind")
        if not isinstance(kind, str) or kind not in counts:
            raise ConfigError(f"{where}: kind is {kind!r}; expected 'stt' or 'tts'")
        table = {"path": default_path(kind, counts[kind]), **table}
        counts[kind] += 1
        models.append(_model(table, where, path.parent))
    server = _table(values.get("server", {}), f"{path}: server")
    if "models" in server:
        raise ConfigError(f"{path}: server: unknown keys ['models']; write a table [models.NAME] for each")
    return dataclasses.replace(from_dict(ServerConfig, server, f"{path}: server"), models=tuple(models))


def _tables(values: Mapping[str, Any], name: str, path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of a table: `[name.NAME]` for each NAME."""
    tables = _table(values.get(name, {}), f"{path}: {name}")
    return {key: _table(table, f"{path}: {name}.{key}") for key, table in tables.items()}


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; expected a table of settings")
    return value


def _model(table: Mapping[str, Any], where: str, folder: Path) -> ServedModel:
    model = from_dict(ServedModel, table, where)
    return model if model.voice_folder is None else dataclasses.replace(model, voice_folder=folder / model.voice_folder)


def _expanded(value: Any) -> Any:
    """Replace `$NAME` in all strings by the environment's values, which may have a `$` themselves, and `$$` by `$`."""
    if isinstance(value, str):
        return _VARIABLE.sub(_of_environment, value)
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    return value


def _of_environment(found: re.Match[str]) -> str:
    if found[0] == "$$":
        return "$"
    name = found["braced"] or found["plain"]
    if name not in os.environ:
        raise ConfigError(
            f"the configuration names {found[0]}, which the environment has not; set it, or write $$ for a $"
        )
    return os.environ[name]


def _of_moshi(values: Mapping[str, Any], path: Path) -> ServerConfig:
    """Read moshi-server's form."""
    _check_keys(values, (*_TOP, *_TOP_IGNORED), str(path))
    tables = _tables(values, "modules", path)
    models = tuple(_module(table, f"{path}: modules.{name}", path.parent) for name, table in tables.items())
    config = from_dict(ServerConfig, {"keys": values.get("authorized_ids", ())}, str(path))
    return dataclasses.replace(config, models=models)


def _module(table: Mapping[str, Any], where: str, folder: Path) -> ServedModel:
    """Read a module of moshi-server's form."""
    named = table.get("type")
    kind = _KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise ConfigError(f"{where}: the type is {named!r}; this server has {', '.join(_KINDS)}")
    py = _table(table.get("py", {}), f"{where}.py")
    _check_keys(table, (*_MODULE, *_MODULE_IGNORED), where)
    _check_keys(py, (*_PY, *_PY_IGNORED), where)
    if table.get("log_frequency_s"):
        raise ConfigError(f"{where}: log_frequency_s would log what clients say; this server does not: remove it")
    # moshi-server takes the key and does not look at it: its guidance leaves the text out too.
    if (no_text := py.get("cfg_is_no_text", True)) is not True:
        raise ConfigError(
            f"{where}: cfg_is_no_text is {no_text!r}, which would guide the choice of text too; neither this server "
            "nor moshi-server does: remove it, or set it to true"
        )
    model, revision = _repository(table, where)
    settings = {
        "kind": kind,
        "model": model,
        "revision": revision,
        "slots": table.get("batch_size"),
        "path": table.get("path", default_path(kind, 0)),
        "temperature": table.get("temperature", py.get("temp")),
    }
    # Keys that a type has no use for are passed over, as a file that moshi-server takes is taken here too.
    if kind == "stt":
        settings["asr_delay_in_tokens"] = table.get("asr_delay_in_tokens")
    else:
        settings |= {
            "voice_folder": _folder(py.get("voice_folder"), folder),
            "default_voice": py.get("default_voice"),
            "guidance_scale": py.get("cfg_coef"),
            "padding_between": py.get("padding_between"),
            "padding_bonus": py.get("padding_bonus"),
            "codebooks": py.get("n_q"),
        }
    return from_dict(ServedModel, {name: value for name, value in settings.items() if value is not None}, where)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(table.keys() - set(known)):
        raise ConfigError(f"{where}: unknown keys {unknown}; of moshi-server's, {', '.join(known)} are known")


def _folder(value: Any, base: Path) -> Any:
    """Return the folder of voices; those of the hub are fetched by name, so that they need no folder."""
    if not isinstance(value, str):
        return value  # refused with the other values of a wrong kind
    return None if value.startswith("hf-snapshot://") else base / value


def _repository(table: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Return the one repository or folder of a module's files, and its revision if one is named."""
    places: dict[str, tuple[str, str | None]] = {}
    for key in _FILES:
        if (value := table.get(key)) is not None:
            if not isinstance(value, str):
                raise ConfigError(f"{where}: {key} is {value!r}; expected the path of a file")
            found = _HUB.fullmatch(value)
            places[key] = (found[1], found[2]) if found else (str(Path(value).parent), None)
    if not places:
        raise ConfigError(f"{where}: no lm_model_file is named; name the model's files")
    if len(set(places.values())) > 1:
        named = ", ".join(f"{key} of {'@'.join(filter(None, place))}" for key, place in places.items())
        raise ConfigError(f"{where}: the files are of several places: {named}; take all of one checkpoint")
    return next(iter(places.values()))
