"""Configuration files of a server: our own form and moshi-server's, strictly read."""

import math
import re

import huggingface_hub
import pytest
from huggingface_hub import errors

from dsm_jax.cli import serve
from dsm_jax.cli.parser import parser
from dsm_jax.cli.setup import UsageError
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.serving.config import ServedModel, ServerConfig, is_loopback, read_config
from dsm_jax.serving.services import load_settings

STT = """
static_dir = "./static/"
log_dir = "$HOME/logs"
instance_name = "stt"
authorized_ids = ["public_token"]

[modules.asr]
path = "/api/asr-streaming"
type = "BatchedAsr"
lm_model_file = "hf://kyutai/stt-1b-en_fr-candle/model.safetensors"
text_tokenizer_file = "hf://kyutai/stt-1b-en_fr-candle/tokenizer_en_fr_audio_8000.model"
audio_tokenizer_file = "hf://kyutai/stt-1b-en_fr-candle/mimi-pytorch-e351c8d8@125.safetensors"
asr_delay_in_tokens = 6
batch_size = 64
conditioning_learnt_padding = true
temperature = 0.25

[modules.asr.model]
audio_codebooks = 20

[modules.tts_py]
type = "Py"
path = "/api/tts_streaming"
text_tokenizer_file = "hf://kyutai/tts-1.6b-en_fr/tokenizer_spm_8k_en_fr_audio.model"
batch_size = 8
text_bos_token = 1

[modules.tts_py.py]
log_folder = "$HOME/logs"
voice_folder = "hf-snapshot://kyutai/tts-voices/**/*.safetensors"
default_voice = "unmute-prod-website/default_voice.wav"
cfg_coef = 2.0
cfg_is_no_text = true
padding_between = 1
n_q = 24
padding_bonus = 0
"""

OURS = """
[server]
host = "0.0.0.0"
port = 9000
keys = ["$SECRET"]
origins = ["https://listed.example"]
max_session_s = 60
log_format = "json"

[server.aliases]
whisper-1 = "digits"

[models.listener]
kind = "stt"
model = "digits"
slots = 3
quantize = "int8"

[models.second]
kind = "stt"
model = "digits"

[models.speaker]
kind = "tts"
model = "digits-tts"
voice_folder = "voices"
guidance_scale = 1.5
"""


def written(tmp_path, text):
    path = tmp_path / "server.toml"
    path.write_text(text)
    return path


def test_moshi_servers_form_is_read_as_it_stands(tmp_path):
    config = read_config(written(tmp_path, STT))
    assert config.keys == ("public_token",)
    assert config.models == (
        ServedModel(
            kind="stt", model="kyutai/stt-1b-en_fr-candle", path="/api/asr-streaming", slots=64, temperature=0.25,
            asr_delay_in_tokens=6,
        ),
        ServedModel(
            kind="tts", model="kyutai/tts-1.6b-en_fr", path="/api/tts_streaming", slots=8,
            default_voice="unmute-prod-website/default_voice.wav", guidance_scale=2.0, padding_between=1, codebooks=24,
            padding_bonus=0,
        ),
    )  # fmt: skip


def test_keys_of_another_type_of_moshi_servers_modules_are_passed_over(tmp_path):
    text = STT.replace("[modules.asr.model]", "[modules.asr.py]\ncfg_coef = 2.0\nn_q = 8\n[modules.asr.model]")
    text = text.replace("text_bos_token = 1", "text_bos_token = 1\nasr_delay_in_tokens = 6")
    assert read_config(written(tmp_path, text)) == read_config(written(tmp_path, STT))


def test_a_revision_is_passed_on_from_either_form_and_the_command_line(tmp_path, monkeypatch):
    asked = []

    def gone(*_, revision, **__):
        asked.append(revision)
        raise errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    files = STT.replace("stt-1b-en_fr-candle/", "stt-1b-en_fr-candle@v1/")
    ours = '[models.listener]\nkind = "stt"\nmodel = "kyutai/stt-1b-en_fr"\nrevision = "v2"'
    for config in (
        read_config(written(tmp_path, files)),
        read_config(written(tmp_path, ours)),
        settings("--stt", "kyutai/stt-1b-en_fr", "--revision", "v3"),
    ):
        with pytest.raises(CheckpointError, match=r"there is no revision v\d of kyutai/stt-1b-en_fr"):
            load_settings(config.models[0])
    assert asked == ["v1", "v2", "v3"]
    with pytest.raises(ConfigError, match="lm_model_file of kyutai/stt-1b-en_fr-candle@v1, text_tokenizer_file of"):
        read_config(written(tmp_path, STT.replace("stt-1b-en_fr-candle/", "stt-1b-en_fr-candle@v1/", 1)))
    with pytest.raises(UsageError, match="--revision v3 is of one model, and 2 are named; set revision in the part"):
        settings("--stt", "kyutai/stt-1b-en_fr", "--tts", "digits-tts", "--revision", "v3")
    with pytest.raises(UsageError, match="--revision v3 is for a model that --stt or --tts names, and none is named"):
        settings("--config", written(tmp_path, ours), "--revision", "v3")


def test_a_folder_of_voices_is_looked_for_before_weights_are_fetched(tmp_path):
    model = ServedModel(kind="tts", model="kyutai/gone", path="/", voice_folder=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"the folder of voices .*none does not exist; name one that does"):
        load_settings(model)


def test_our_form_is_read_and_the_environment_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "from the environment")
    config = read_config(written(tmp_path, OURS))
    assert (config.host, config.port, config.keys) == ("0.0.0.0", 9000, ("from the environment",))
    assert (config.origins, config.max_session_s) == (("https://listed.example",), 60.0)
    assert config.log_format == "json"
    assert config.aliases == {"whisper-1": "digits"}
    assert [(m.kind, m.model, m.path, m.slots) for m in config.models] == [
        ("stt", "digits", "/api/asr-streaming", 3),
        ("stt", "digits", "/api/asr-streaming-2", None),
        ("tts", "digits-tts", "/api/tts_streaming", None),
    ]
    assert config.models[2].voice_folder == tmp_path / "voices"
    assert [m.quantize for m in config.models] == ["int8", None, None]
    assert load_settings(config.models[0]).quantize == "int8"


@pytest.mark.parametrize(
    "written_as,value",
    [
        ("$SECRET", "s3cr$et9value$$"),
        ("${SECRET}s", "s3cr$et9value$$s"),
        ("$SECRET$SECRET", "s3cr$et9value$$" * 2),
        ("$$SECRET", "$SECRET"),
        ("a$$b$$", "a$b$"),
        ("$$$SECRET", "$s3cr$et9value$$"),
        ("a$-b$", "a$-b$"),
    ],
)
def test_a_dollar_of_the_environments_value_stands_and_two_of_the_file_are_one(
    tmp_path, monkeypatch, written_as, value
):
    monkeypatch.setenv("SECRET", "s3cr$et9value$$")
    assert read_config(written(tmp_path, OURS.replace("$SECRET", written_as))).keys == (value,)


@pytest.mark.parametrize("name", ["$SECRETS", "${SECRETS}", "${SECRET"])
def test_a_variable_that_there_is_not_is_refused_as_it_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SECRET", "s")
    words = f"names {name}, which the environment has not; set it, or write $$ for a $"
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_config(written(tmp_path, OURS.replace("$SECRET", f"a{name}")))


def test_a_path_and_a_temperature_are_those_of_the_file(tmp_path):
    ours = read_config(written(tmp_path, '[models.a]\nkind = "stt"\nmodel = "digits"\npath = "/mine"'))
    assert ours.models[0].path == "/mine"
    theirs = read_config(written(tmp_path, STT.replace("n_q = 24", "n_q = 24\ntemp = 0.75")))
    assert [model.temperature for model in theirs.models] == [0.25, 0.75]


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("path =", "paths =", r"modules.asr: unknown keys \['paths'\]; of moshi-server's, type, path"),
        ("cfg_coef", "cfg", r"modules.tts_py: unknown keys \['cfg'\]"),
        ("instance_name", "instance", r"unknown keys \['instance'\]; of moshi-server's"),
        ('"BatchedAsr"', '"Mimi"', "modules.asr: the type is 'Mimi'; this server has BatchedAsr"),
        (
            "stt-1b-en_fr-candle/tok",
            "stt-2.6b-en/tok",
            "files are of several places: lm_model_file of kyutai/stt-1b",
        ),
        ("conditioning_learnt_padding = true", "log_frequency_s = 10", "would log what clients say"),
        ("$HOME/logs", "$NOT_SET_ANYWHERE/logs", r"names \$NOT_SET_ANYWHERE, which the environment has not"),
        (
            "no_text = true",
            "no_text = false",
            "cfg_is_no_text is False, which would guide the choice of text",
        ),
        ("batch_size = 64", "batch_size = 0", "has 0 slots; expected 1 to 4096"),
        ("batch_size = 64", "batch_size = 4097", "has 4097 slots; expected 1 to 4096"),
        ("no_text = true", "no_text = 0", "cfg_is_no_text is 0, which would guide the choice of text"),
        ('path = "/api/tts', 'path = "api/tts', "expected one that begins with /"),
        ('path = "/api/tts_streaming"', 'path = "/api/asr-streaming"', "two models have the path /api/asr-streaming"),
    ],
)
def test_a_setting_that_moshi_server_has_not_is_refused_by_name(tmp_path, old, new, words):
    assert old in STT
    with pytest.raises(ConfigError, match=words):
        read_config(written(tmp_path, STT.replace(old, new, 1)))


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("port =", "prot =", r"server: unknown keys \['prot'\]"),
        ("port = 9000", 'port = "9000"', "port is '9000'"),
        ("slots = 3", "slot = 3", r"models.listener: unknown keys \['slot'\]"),
        ('kind = "tts"', 'kind = "vts"', "models.speaker: kind is 'vts'; expected 'stt' or 'tts'"),
        ("[server]", "[serve]\n[server]", r"unknown tables \['serve'\]; expected \[server\] and \[models.NAME\]"),
        ('["$SECRET"]', '[""]', "a key is empty"),
        ("max_session_s = 60", "max_session_s = -1", "max_session_s is -1.0; expected a number from 0"),
        ("max_session_s = 60", "reserve_live = -3", "server: reserve_live is -3; expected a number from 0"),
        ('["$SECRET"]', '["  "]', "a key is empty"),
        ('log_format = "json"', 'log_format = "xml"', "log_format is 'xml'; expected 'text' or 'json'"),
        ('quantize = "int8"', 'quantize = "int4"', "models.listener: quantize is 'int4'; expected 'int8'"),
        ('voice_folder = "voices"', "voice_folder = 3", "models.speaker: voice_folder is 3; expected .*Path"),
        ("[server]", "server]", "is not a configuration file"),
    ],
)
def test_a_setting_that_we_have_not_is_refused_by_name(tmp_path, monkeypatch, old, new, words):
    monkeypatch.setenv("SECRET", "s")
    assert old in OURS
    with pytest.raises(ConfigError, match=words):
        read_config(written(tmp_path, OURS.replace(old, new, 1)))


@pytest.mark.parametrize(
    "text,words",
    [
        ("models = 5", "models is 5; expected a table of settings"),
        ("models = []", r"models is \[\]; expected a table of settings"),
        ("[models]\na = 5", "models.a is 5; expected a table of settings"),
        ("server = 5", "server is 5; expected a table of settings"),
        ('[models.a]\nkind = ["stt"]\nmodel = "digits"', r"models.a: kind is \['stt'\]; expected 'stt' or 'tts'"),
        ("modules = 5", "modules is 5; expected a table of settings"),
        ("[modules]\na = 5", "modules.a is 5; expected a table of settings"),
        ('[modules.a]\ntype = ["Py"]', r"modules.a: the type is \['Py'\]; this server has"),
        ('[modules.a]\ntype = "Py"\npy = 5', "modules.a.py is 5; expected a table of settings"),
        ('[modules.a]\ntype = "Py"\nlm_model_file = 5', "modules.a: lm_model_file is 5; expected the path of a file"),
        ('[modules.a]\ntype = "Py"\nlm_model_file = "a/b"\npath = 5', "modules.a: path is 5; expected str"),
        ('[modules.a]\ntype = "Py"\nlm_model_file = "a/b"\npy.voice_folder = 5', "modules.a: voice_folder is 5"),
        ("authorized_ids = 5\n[modules]", "keys is 5; expected tuple"),
        ("[server]\nport = " + "9" * 5000, "is not a configuration file"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        read_config(written(tmp_path, text))


def test_a_file_that_there_is_not_or_that_is_a_folder_is_refused_as_such(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no configuration file .*nope\.toml; give the path of a TOML file"):
        read_config(tmp_path / "nope.toml")
    with pytest.raises(ConfigError, match=rf"{tmp_path} is not a configuration file \(.*Is a directory.*\); give"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", [STT, OURS])
def test_a_byte_order_mark_changes_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "s")
    plain = read_config(written(tmp_path, text))
    assert read_config(written(tmp_path, "\ufeff" + text)) == plain


def test_a_host_that_others_reach_needs_keys():
    with pytest.raises(ConfigError, match=r"would listen on 0.0.0.0 without keys; give --api-key-file FILE"):
        ServerConfig(host="0.0.0.0").check_access()
    for config in (ServerConfig(), ServerConfig(host="0.0.0.0", keys=("k",)), ServerConfig(host="::", no_auth=True)):
        config.check_access()


@pytest.mark.parametrize(
    "given,kept",
    [
        ("https://app.example", "https://app.example"),
        ("HTTPS://App.Example/", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:443/", "http://app.example:443"),
        ("http://[::1]:80", "http://[::1]"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_an_origin_is_kept_as_browsers_write_it(given, kept):
    assert ServerConfig(origins=(given,)).origins == (kept,)
    assert settings("--origin", given).origins == (kept,)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "",
        "app.example",
        "https://",
        "https://app.example/page",
        "https://a@app.example",
        "https://é.example",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    words = f"the origin is {origin!r}; expected a scheme and a host alone, such as https://app.example"
    with pytest.raises(ConfigError, match=re.escape(words)):
        ServerConfig(origins=(origin,))


@pytest.mark.parametrize(
    "host,loopback",
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("example.com", False), ("192.168.0.1", False), ("", False)],
)  # fmt: skip
def test_loopback_is_this_machine_alone(host, loopback):
    assert is_loopback(host) == loopback


def settings(*arguments):
    return serve.settings(parser().parse_args(["serve", *map(str, arguments)]))


@pytest.mark.parametrize("name", ["max_session_s", "max_upload_mb", "drain_s", "idle_s", "min_step_ms", "reserve_live"])
def test_numbers_that_the_server_cannot_count_to_are_refused(name):
    assert getattr(ServerConfig(**{name: 0}), name) == 0
    for value in (-1, 1e9, math.nan):
        with pytest.raises(ConfigError, match=f"{name} is {value}; expected a number from 0"):
            ServerConfig(**{name: value})


@pytest.mark.parametrize("port", [-1, 65536, 84008])
def test_a_port_that_there_is_not_is_refused(port):
    with pytest.raises(ConfigError, match=f"the port is {port}; expected a number from 0, .*, to 65535"):
        settings("--port", port)


def test_the_form_of_the_weights_is_that_of_each_model_that_is_named():
    found = settings("--stt", "digits", "--tts", "digits-tts", "--quantize", "int8", "--dtype", "bfloat16").models
    assert [(model.model, model.quantize, model.dtype) for model in found] == [
        ("digits", "int8", "bfloat16"),
        ("digits-tts", "int8", "bfloat16"),
    ]


def test_ports_from_0_to_65535_are_taken():
    assert [settings("--port", port).port for port in (0, 65535)] == [0, 65535]


def test_keys_are_the_lines_of_a_file_and_the_parts_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(serve.KEYS, "first, second,")
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbfthird\r\n\n  fourth \n")
    assert settings("--api-key-file", path).keys == ("first", "second", "third", "fourth")


def test_keys_beside_no_auth_are_refused_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEYS, raising=False)
    config, path = written(tmp_path, '[server]\nkeys = ["first"]'), tmp_path / "keys"
    path.write_text("second\n")
    assert settings("--config", config, "--api-key-file", path).keys == ("first", "second")
    open_to_all = settings("--no-auth")
    assert (open_to_all.no_auth, open_to_all.keys) == (True, ())

    def refused(*arguments, places: str) -> None:
        words = f"keys are given by {places}; leave out --no-auth or the keys"
        with pytest.raises(UsageError, match=re.escape(words)):
            settings("--no-auth", *arguments)

    refused("--api-key-file", path, places=f"--api-key-file {path}")
    refused("--config", config, places=f"the configuration {config}")
    monkeypatch.setenv(serve.KEYS, "third")
    refused(places="the variable DSM_JAX_API_KEYS")
    refused("--api-key-file", path, places=f"the variable DSM_JAX_API_KEYS and --api-key-file {path}")


@pytest.mark.parametrize("key", ["clé", "\udcff"])
def test_a_key_that_no_header_holds_is_refused_wherever_it_is_and_not_printed(tmp_path, monkeypatch, key):
    path = tmp_path / "keys"
    path.write_bytes("clé".encode())
    monkeypatch.setenv("SECRET", key)
    for read in (
        lambda: ServerConfig(keys=("good", key)),
        lambda: read_config(written(tmp_path, OURS)),
        lambda: settings("--api-key-file", path),
    ):
        with pytest.raises(ConfigError, match="a key has characters beyond ASCII, which no header") as refused:
            read()
        assert key not in str(refused.value)


@pytest.mark.parametrize("line", ["# alice", "correct horse battery", "one\ttwo"])
def test_a_key_with_white_space_is_refused_in_a_file_and_not_printed(tmp_path, monkeypatch, line):
    path = tmp_path / "keys"
    path.write_text(f"good\n{line}\n")
    with pytest.raises(UsageError, match=r"keys:2 has white space in it, which no key of a file may have") as refused:
        settings("--api-key-file", path)
    assert line not in str(refused.value)
    monkeypatch.setenv(serve.KEYS, f"good,{line}")  # where commas alone part keys
    assert settings().keys == ("good", line)
