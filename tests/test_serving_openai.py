"""OpenAI's dialect over HTTP, as the official client and plain requests see it."""

import asyncio
import base64
import concurrent.futures
import io
import json
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import soundfile
from starlette.requests import ClientDisconnect

import dsm_jax
from dsm_jax import audio
from dsm_jax.serving import uploads
from dsm_jax.serving.encoding import SoundEncoder, _Pipe, pcm16, wav_header
from dsm_jax.serving.openai import routes
from dsm_jax.serving.openai.errors import ApiError, api_error, parse_object
from dsm_jax.serving.openai.formats import WordDeltas, transcript_response
from dsm_jax.serving.openai.requests import check_language
from dsm_jax.serving.outbox import Ended
from dsm_jax.stt.events import Word, WordEnded, WordStarted
from dsm_jax.stt.options import Prompt, TranscribeOptions
from dsm_jax.stt.transcript import Transcript
from tests.helpers.serving import Running, running, served

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("idle")]

AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
RECORDING = AUDIO / "digits_jackson.flac"
TEXT = "three one four"
BAD = "invalid_value"
ALIASES = {"whisper-1": "digits", "tts-1": "digits-tts", "alloy": "jackson"}


@pytest.fixture(scope="module")
def server():
    models = served("stt", "digits"), served("tts", "digits-tts")
    with running(*models, page=False, metrics=False, aliases=ALIASES, max_upload_mb=2.0) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected():
    return dsm_jax.transcribe(dsm_jax.load("digits"), RECORDING)


@pytest.fixture(scope="module")
def speech():
    model = dsm_jax.load("digits-tts")
    return dsm_jax.synthesize(model, TEXT, voice="jackson")


def transcribe(client: openai.OpenAI, **options):
    with RECORDING.open("rb") as file:
        return client.audio.transcriptions.create(**{"model": "digits", "file": file, **options})


def post(server: Running, *, file: bytes | None = None, **fields) -> httpx.Response:
    content = RECORDING.read_bytes() if file is None else file
    return httpx.post(
        f"{server.url}/v1/audio/transcriptions",
        data={"model": "digits", **fields},
        files={"file": ("a.flac", content, "audio/flac")},
        timeout=60,
    )


def refused(answer: httpx.Response, status: int, **fields) -> str:
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"}
    assert {name: error[name] for name in fields} == fields
    return error["message"]


# Transcriptions.


def test_the_text_is_that_of_transcribe(client, expected):
    answer = transcribe(client)
    assert answer.text == expected.text == "three one four one five nine two six five"
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(expected.duration, abs=1e-3)


def test_an_alias_names_a_model(client, expected):
    assert transcribe(client, model="whisper-1").text == expected.text


def test_text_and_subtitles_are_those_of_the_library(client, expected):
    assert transcribe(client, response_format="text") == expected.text + "\n"
    assert transcribe(client, response_format="srt") == expected.to_srt()
    assert transcribe(client, response_format="vtt") == expected.to_vtt()


def test_verbose_json_has_the_words_and_segments_that_were_asked_for(client, expected):
    answer = transcribe(client, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert answer.text == expected.text
    assert answer.duration == pytest.approx(expected.duration, abs=1e-3)
    told = [(word.word, word.start, word.end) for word in answer.words]
    assert told == [(word.text, round(word.start, 3), round(word.end, 3)) for word in expected.words]
    assert [segment.text for segment in answer.segments] == [segment.text for segment in expected.segments]
    assert [segment.id for segment in answer.segments] == list(range(len(expected.segments)))
    assert all(-1 < segment.avg_logprob <= 0 for segment in answer.segments)
    assert all(segment.end > segment.start and segment.compression_ratio > 0 for segment in answer.segments)
    assert answer.language == "und"
    words_alone = transcribe(client, response_format="verbose_json", timestamp_granularities=["word"])
    assert words_alone.segments is None
    assert len(words_alone.words) == 9
    segments_alone = transcribe(client, response_format="verbose_json", language="en", temperature=0.01)
    assert {segment.temperature for segment in segments_alone.segments} == {0.01}
    assert segments_alone.words is None
    assert len(segments_alone.segments) == len(expected.segments)
    assert segments_alone.language == "en"


def test_deltas_of_each_word_join_to_the_text(server, client, expected):
    events = list(transcribe(client, stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) == 9
    assert [event.type for event in events].count("transcript.text.done") == 1
    assert "".join(deltas) == events[-1].text == expected.text
    assert events[-1].usage.seconds == pytest.approx(expected.duration, abs=1e-3)


def test_a_stream_ends_with_done(server):
    answer = post(server, stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    # A proxy between passes each piece on, and keeps none.
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["type"] for line in lines[-3:-1]] == ["transcript.text.delta", "transcript.text.done"]


def test_a_long_recording_is_streamed_while_it_is_transcribed(server):
    pcm_T = np.tile(audio.read(RECORDING, 24_000), 5)
    file = io.BytesIO()
    soundfile.write(file, pcm_T, 24_000, format="WAV", subtype="PCM_16")
    with httpx.stream(
        "POST",
        f"{server.url}/v1/audio/transcriptions",
        data={"model": "digits", "stream": "true"},
        files={"file": ("a.wav", file.getvalue())},
        timeout=60,
    ) as answer:
        parts = [(part, server.server.models[0].engine.used) for part in answer.iter_text()]
    assert len(parts) > 5
    assert parts[0][1] == 1, "the first delta came after the session had ended"
    assert parts[-1][0].endswith("data: [DONE]\n\n")


def test_probabilities_are_those_of_the_words(client, expected):
    wanted = [np.log(max(word.probability, 1e-10)) for word in expected.words]
    answer = transcribe(client, include=["logprobs"])
    assert [one.token for one in answer.logprobs] == [word.text for word in expected.words]
    np.testing.assert_allclose([one.logprob for one in answer.logprobs], wanted, atol=1e-3)
    events = list(transcribe(client, include=["logprobs"], stream=True))
    np.testing.assert_allclose([one.logprob for one in events[-1].logprobs], wanted, atol=1e-3)


@pytest.fixture
def options_heard(monkeypatch):
    """Gather the options of the sessions that begin: clear recordings have the same text with any."""
    heard, begin = [], uploads.LiveHearing

    def beginning(service, outbox, utterance, **settings):
        heard.append(utterance.options)
        return begin(service, outbox, utterance, **settings)

    monkeypatch.setattr(uploads, "LiveHearing", beginning)
    return heard


def test_a_prompt_steers_and_is_not_part_of_the_text(client, options_heard):
    options = TranscribeOptions(prompt=Prompt(text="seven eight", exclude_from_output=True))
    wanted = dsm_jax.transcribe(dsm_jax.load("digits"), RECORDING, options=options)
    assert transcribe(client, prompt="seven eight").text == wanted.text != ""
    assert [heard.prompt for heard in options_heard] == [options.prompt]


def test_a_temperature_is_that_of_the_library(client, options_heard):
    wanted = dsm_jax.transcribe(dsm_jax.load("digits"), RECORDING, options=TranscribeOptions(temperature=1.0))
    assert transcribe(client, temperature=1.0).text == wanted.text
    assert [heard.temperature for heard in options_heard] == [1.0]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "message"),
    [
        ({"model": "gpt-9"}, 404, "model", "model_not_found", "the model 'gpt-9' is not served here; it has digits"),
        ({"model": "digits-tts"}, 404, "model", "model_not_found", "'digits-tts' is not served here"),
        ({"model": ""}, 400, "model", "missing_required_parameter", "no model is named"),
        ({"response_format": "xml"}, 400, "response_format", BAD, "response_format is 'xml'; expected one"),
        ({"response_format": "diarized_json"}, 400, "response_format", BAD, "not tell speakers apart"),
        ({"response_format": "srt", "stream": "true"}, 400, "stream", BAD, "false with the response_format"),
        ({"stream": "maybe"}, 400, "stream", BAD, "stream is 'maybe'; expected true or false"),
        ({"temperature": "2"}, 400, "temperature", BAD, "temperature is '2'; expected a number from 0 to 1"),
        ({"temperature": "nan"}, 400, "temperature", BAD, "expected a number from 0 to 1"),
        ({"language": "English!"}, 400, "language", BAD, "expected a code of ISO 639"),
        ({"prompt": "%%%"}, 400, "prompt", BAD, "cannot spell"),
        ({"include[]": "tokens"}, 400, "include", BAD, "include is 'tokens'; expected logprobs"),
        ({"include[]": "logprobs", "response_format": "text"}, 400, "include", BAD, "set it to json"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities", BAD, "set it to verbose_json"),
        ({"timestamp_granularities[]": "frame"}, 400, "timestamp_granularities", BAD, "word or segment"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_supported_is_named(server, fields, status, param, code, message):
    assert message in refused(post(server, **fields), status, param=param, code=code, type="invalid_request_error")


def test_what_is_no_audio_is_refused_by_name(server, client):
    assert "file" in refused(post(server, file=b"no audio at all" * 99), 400, param="file", code="invalid_audio")
    refused(post(server, file=b""), 400, param="file", code="invalid_audio")
    refused(post(server, file=b"RIFF", stream="true"), 400, param="file", code="invalid_audio")
    with pytest.raises(openai.BadRequestError, match="not audio that can be decoded"):
        client.audio.transcriptions.create(model="digits", file=("a.wav", b"no audio at all"))


def test_a_large_recording_is_refused(server):
    message = refused(post(server, file=bytes(2_100_000)), 413, param="file", code="file_too_large")
    assert message == "the recording is larger than 2 MB; send it in parts"
    refused(post(server, file=bytes(9_000_000)), 413, code="file_too_large")


def test_a_body_of_unknown_length_is_limited_too(server):
    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{server.url}/v1/audio/transcriptions", content=body(), headers=headers, timeout=60)
    refused(answer, 413, code="file_too_large")


FIELD = b'--x\r\nContent-Disposition: form-data; name="a"'


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (b"", ""),
        (b"x" * 99, "; boundary=x"),
        (b"--x\r\nnothing\r\n\r\n", "; boundary=x; charset=idna"),
        (FIELD + b"\r\n\r\nb\r\n--x--", "; boundary=x; charset=idna"),
        (FIELD.replace(b'"a"', b'"model"') + b"\r\n\r\ndigits\r\n--x--", "; boundary=x"),
        (99 * (FIELD + b"\r\n\r\nb\r\n"), "; boundary=x"),
        (3 * (FIELD + b'; filename="a"\r\n\r\nb\r\n'), "; boundary=x"),
        (FIELD + b"\r\n\r\n" + b"b" * 99_999, "; boundary=x"),
    ],
)
def test_a_form_that_is_none_is_refused(server, body, more):
    url = f"{server.url}/v1/audio/transcriptions"
    headers = {"content-type": f"multipart/form-data{more}"}
    refused(httpx.post(url, content=body, headers=headers), 400, type="invalid_request_error")
    refused(httpx.post(url, content=body, headers={"content-type": "application/json"}), 400, param="file")


# Speech.


def samples(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2").astype(np.int32)


def test_pcm_equals_synthesize(client, speech):
    answer = client.audio.speech.create(model="digits-tts", voice="jackson", input=TEXT, response_format="pcm")
    assert answer.response.headers["content-type"] == "audio/pcm"
    wanted = samples(pcm16(speech.pcm))
    assert samples(answer.content).shape == wanted.shape
    assert np.abs(samples(answer.content) - wanted).max() <= 1


def test_wav_is_what_the_library_writes_but_for_its_length(client, speech, tmp_path):
    answer = client.audio.speech.create(model="tts-1", voice={"id": "alloy"}, input=TEXT, response_format="wav")
    assert answer.content[:44] == wav_header(24_000)
    audio.write(tmp_path / "a.wav", speech.pcm, 24_000)
    wanted_T, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 24_000
    assert np.abs(samples(answer.content[44:]) - wanted_T).max() <= 1


@pytest.mark.parametrize("form", ["mp3", "opus", "flac"])
def test_other_formats_hold_the_same_sound(client, speech, form):
    answer = client.audio.speech.create(model="digits-tts", voice="jackson", input=TEXT, response_format=form)
    kind = {"mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac"}[form]
    assert answer.response.headers["content-type"] == kind
    assert answer.response.headers["transfer-encoding"] == "chunked"
    heard_T = audio.read(io.BytesIO(answer.content), 24_000)
    if form == "flac":
        assert np.abs(heard_T - speech.pcm).max() < 1e-4
        return
    # Coding with loss: the sound is the same up to a lag, so its correlation is near 1.
    size = speech.pcm.size
    padded_T = np.pad(heard_T, (0, max(0, size + 4_000 - heard_T.size)))
    best = max(np.corrcoef(padded_T[lag : lag + size], speech.pcm)[0, 1] for lag in range(0, 2_500))
    assert best > 0.95


def test_mp3_is_the_default_and_its_first_bytes_leave_before_the_sound_is_made(server, client):
    text = " ".join(["one two three four five"] * 6)
    with client.audio.speech.with_streaming_response.create(model="digits-tts", voice="jackson", input=text) as answer:
        assert answer.headers["content-type"] == "audio/mpeg"
        used = [server.server.models[1].engine.used for _ in answer.iter_bytes()]
    assert used[0] == 1, "the first bytes came after the session had ended"
    assert len(used) > 5


def test_events_carry_the_same_bytes(server, client):
    body = {"model": "digits-tts", "voice": "jackson", "input": TEXT, "response_format": "pcm", "stream_format": "sse"}
    answer = httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    body |= {"stream_format": "audio", "instructions": "cheerful"}
    assert sound == httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=60).content
    frames = len(sound) // (2 * 1920)
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"] == {"input_tokens": 3, "output_tokens": frames, "total_tokens": 3 + frames}
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "message"),
    [
        ({"model": "digits"}, 404, "model", "model_not_found", "it has digits-tts"),
        ({"model": 5}, 400, "model", "missing_required_parameter", "no model is named"),
        ({"voice": "nova"}, 400, "voice", BAD, "voice is 'nova'; expected one of digits-tts's: "),
        ({"voice": {"name": "x"}}, 400, "voice", "missing_required_parameter", "no voice is named"),
        ({"input": ""}, 400, "input", "missing_required_parameter", "there is no text"),
        ({"input": "\ud800 one"}, 400, "input", BAD, "half of a character"),
        ({"input": "one " * 1025}, 400, "input", "string_above_max_length", "input has 4100 characters; at most 4096"),
        ({"input": "%%"}, 400, "input", BAD, "%%"),
        ({"response_format": "aac"}, 400, "response_format", BAD, "expected one of mp3, opus, flac"),
        ({"response_format": ["mp3"]}, 400, "response_format", BAD, "expected one of mp3, opus, flac"),
        ({"stream_format": "ws"}, 400, "stream_format", BAD, "expected audio or sse"),
        ({"speed": 1.5}, 400, "speed", "unsupported_value", "padding_bonus"),
        ({"speed": 9}, 400, "speed", BAD, "a number from 0.25 to 4"),
        ({"speed": "1"}, 400, "speed", BAD, "a number from 0.25 to 4"),
        ({"speed": True}, 400, "speed", BAD, "a number from 0.25 to 4"),
    ],
)  # fmt: skip
def test_a_speech_that_cannot_be_made_names_its_field(server, change, status, param, code, message):
    body = {"model": "digits-tts", "voice": "jackson", "input": TEXT} | change
    answer = httpx.post(f"{server.url}/v1/audio/speech", content=json.dumps(body), timeout=60)
    assert message in refused(answer, status, param=param, code=code)


def test_a_body_that_is_no_object_is_refused(server):
    for body in (b"", b"{", b"[]", b"[" * 200_000, b"\xff"):
        refused(httpx.post(f"{server.url}/v1/audio/speech", content=body), 400, code="invalid_json")
    refused(httpx.post(f"{server.url}/v1/audio/speech", content=bytes(300_000)), 413, param="input")


# Lists, access and errors.


def test_models_and_voices_are_listed(server, client):
    assert [model.id for model in client.models.list()] == ["digits", "digits-tts"]
    assert client.models.retrieve("digits").owned_by == "dsm-jax"
    assert client.models.retrieve("digits-tts").id == "digits-tts"
    assert abs(client.models.retrieve("digits").created - time.time()) < 3_600
    assert client.models.retrieve("whisper-1").id == "digits"
    with pytest.raises(openai.NotFoundError, match="'kyutai/none' is not served here; it has digits, digits-tts"):
        client.models.retrieve("kyutai/none")
    listed = httpx.get(f"{server.url}/v1/audio/voices").json()["data"]
    assert "jackson" in [voice["id"] for voice in listed]
    assert [voice["default"] for voice in listed].count(True) == 1
    assert httpx.get(f"{server.url}/v1/audio/voices?model=digits-tts").json()["data"] == listed
    refused(httpx.get(f"{server.url}/v1/audio/voices?model=digits"), 404, code="model_not_found")


def test_paths_and_methods_that_there_are_not_have_the_same_shape(server):
    assert refused(httpx.get(f"{server.url}/v1/nothing"), 404, code="not_found") == "there is no /v1/nothing"
    for method in ("GET", "PUT", "OPTIONS", "BREW"):
        message = refused(httpx.request(method, f"{server.url}/v1/audio/speech"), 405, code="method_not_allowed")
        assert message == f"the method is {method}; expected POST"
    assert httpx.head(f"{server.url}/v1/models").status_code == 200
    assert [httpx.get(server.url + path).status_code for path in ("/", "/page.js", "/metrics")] == [404] * 3


def test_pages_of_other_origins_are_refused(server):
    answer = httpx.get(f"{server.url}/v1/models", headers={"origin": "http://elsewhere.example"})
    refused(answer, 403, code="origin_not_allowed", type="permission_error")
    assert httpx.get(f"{server.url}/v1/models", headers={"origin": server.url}).status_code == 200


def test_a_key_is_asked_for_everywhere(server, caplog):
    from dsm_jax.serving.access import Keys

    keys, server.server.keys = server.server.keys, Keys(["right-key"])
    try:
        for path in ("models", "audio/voices", "audio/speech", "nothing"):
            refused(httpx.get(f"{server.url}/v1/{path}"), 401, code="invalid_api_key", type="authentication_error")
        refused(httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer wrong-key"}), 401)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right-key", max_retries=0) as client:
            assert len(list(client.models.list())) == 2
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
        ):
            client.models.list()
    finally:
        server.server.keys = keys
    assert "-key" not in caplog.text


def test_a_full_server_asks_to_come_again(server):
    engine = server.server.models[0].engine
    limit, engine._queue_limit = engine._queue_limit, 0
    held = [_Held() for _ in range(engine.total)]
    try:
        for one in held:
            engine.hold(one)
        answer = post(server)
        assert answer.headers["retry-after"] == "1"
        refused(answer, 503, type="server_error", code="server_full")
    finally:
        engine._queue_limit = limit
        for one in held:
            engine.leave(one)


class _Held:
    """A session that takes a slot and does nothing."""

    is_file = False


def test_a_fault_of_the_server_is_told_without_its_cause(server, monkeypatch, caplog):
    threads = []

    def broken(*args, **options):
        in_loop = threading.current_thread().name == "server"
        threads.append("on the event loop" if in_loop else "off the event loop")
        raise RuntimeError("the secret cause")

    monkeypatch.setattr(server.server.models[1].service, "session", broken)
    body = {"model": "digits-tts", "voice": "jackson", "input": TEXT}
    answer = httpx.post(f"{server.url}/v1/audio/speech?auth_id=a-key", json=body)
    assert "secret" not in refused(answer, 500, type="server_error", code="server_error")
    told = [record.getMessage() for record in caplog.records if record.name == "dsm_jax.serving"]
    assert told == ["a request of the path /v1/audio/speech has failed"], "a key may stand in the rest of an address"
    assert threads == ["off the event loop"], "fetching a voice would hold up all sessions"


def test_clients_that_leave_give_their_slots_back(server):
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for _ in range(6):
                body = {"model": "digits-tts", "voice": "jackson", "input": "one two three four " * 6}
                async with client.stream("POST", "/v1/audio/speech", json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        break
                files = {"file": ("a.flac", RECORDING.read_bytes())}
                fields = {"model": "digits", "stream": "true"}
                async with client.stream("POST", "/v1/audio/transcriptions", data=fields, files=files) as answer:
                    async for _ in answer.aiter_bytes():
                        break
            for _ in range(200):
                if not any(served.engine.used for served in server.server.models):
                    return
                await asyncio.sleep(0.05)
        raise AssertionError("slots are still held")

    asyncio.run(leave())


def long_recording() -> bytes:
    """Return 38 s of digits as a wav file: little less than the server takes."""
    file = io.BytesIO()
    soundfile.write(file, np.tile(audio.read(RECORDING, 24_000), 5), 24_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def end_sessions(server: Running, ended: Ended) -> None:
    """Put an end into the outboxes of all sessions, as the engine would."""
    loop = server.server.loop
    assert loop is not None
    for ticket in list(server.server._tickets):
        loop.call_soon_threadsafe(ticket.session.outbox.put, [ended])


def test_a_client_that_hangs_up_on_a_long_transcription_frees_its_slot(server, monkeypatch):
    engine, ended = server.server.models[0].engine, []
    leave = engine.leave
    monkeypatch.setattr(engine, "leave", lambda session: (ended.extend(server.server._tickets), leave(session)))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/audio/transcriptions",
            data={"model": "digits"},
            files={"file": ("a.wav", long_recording())},
            timeout=httpx.Timeout(60, read=0.5),
        )
    start = time.monotonic()
    while engine.used:
        assert time.monotonic() - start < 30
        time.sleep(0.02)
    assert "client" in [ticket.reason for ticket in ended]
    assert max(ticket.frames for ticket in ended) < 450  # of the recording's 476


def test_an_engine_that_fails_is_told_while_the_text_is_streamed(server, client):
    events = client.audio.transcriptions.create(model="digits", file=("a.wav", long_recording()), stream=True)
    assert next(iter(events)).type == "transcript.text.delta"
    end_sessions(server, Ended(1011, "the server's engine has failed"))
    with pytest.raises(openai.APIError, match="the server's engine has failed") as caught:
        list(events)
    assert caught.value.code == "server_full"


def test_an_engine_that_fails_gives_no_shorter_transcript(server):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, file=long_recording())
        while not server.server._tickets and not answer.done():
            time.sleep(0.01)
        end_sessions(server, Ended(1011, "the server's engine has failed"))
        refused(answer.result(), 503, code="server_full")


def test_a_speech_that_fails_is_cut_off_and_not_ended(server, caplog):
    body = {"model": "digits-tts", "voice": "jackson", "input": "one two three four " * 20, "response_format": "pcm"}
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json=body, timeout=60) as answer:
        pieces = answer.iter_bytes()
        assert next(pieces)
        end_sessions(server, Ended(1007, "the secret cause"))
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert "an answer was cut off: SpeechError" in caplog.text
    assert "secret" not in caplog.text


def test_a_speech_that_fails_is_told_among_its_events_and_by_its_status_before_them(server, monkeypatch):
    body = {"model": "digits-tts", "voice": "jackson", "response_format": "pcm", "stream_format": "sse"}
    long = {"input": "one two three four " * 20}
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json=body | long, timeout=60) as answer:
        lines = answer.iter_lines()
        assert "speech.audio.delta" in next(lines)
        end_sessions(server, Ended(1007, "the text cannot be said"))
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert events[-1]["error"]["message"] == "the text cannot be said"
    assert "speech.audio.done" not in [event.get("type") for event in events]

    async def failing(*_):
        raise dsm_jax.SpeechError("the text cannot be said")
        yield

    monkeypatch.setattr(routes, "spoken", failing)
    answer = httpx.post(f"{server.url}/v1/audio/speech", json=body | {"input": TEXT})
    assert refused(answer, 400) == "the text cannot be said"


def test_eight_clients_at_once_get_what_one_gets(server, expected, speech):
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            heard = [
                client.audio.transcriptions.create(model="digits", file=("a.flac", RECORDING.read_bytes()))
                for _ in range(5)
            ]
            said = [
                client.audio.speech.create(model="digits-tts", voice="jackson", input=TEXT, response_format="pcm")
                for _ in range(3)
            ]
            answers = await asyncio.gather(*heard, *said)
        assert {answer.text for answer in answers[:5]} == {expected.text}
        for answer in answers[5:]:
            assert np.abs(samples(answer.content) - samples(pcm16(speech.pcm))).max() <= 1

    asyncio.run(ask())


# Parts.


def ended(text: str) -> WordEnded:
    return WordEnded(Word(text, 0.0, 0.1, 1.0))


def test_deltas_wait_for_the_word_before_them():
    deltas = WordDeltas()
    events = [WordStarted("hel", 0.0), WordStarted("wor", 0.1), ended("hello"), ended("world"), ended("again")]
    assert [deltas.add(event) for event in events] == ["hel", "", "lo wor", "ld", " again"]
    assert deltas.text == "hello world again"


def test_a_text_that_changed_after_it_left_still_joins():
    deltas = WordDeltas()
    told = "".join(deltas.add(event) for event in (WordStarted("to", 0.0), ended("two"), ended("six")))
    assert told == deltas.text == "to six"


def test_each_segment_has_the_mean_probability_of_its_own_words():
    words = Word("one", 0.0, 0.4, 0.5), Word("two.", 0.5, 0.9, 1.0), Word("three", 5.0, 5.4, 0.25)
    answer = transcript_response(
        Transcript("one two. three", words, (), 6.0),
        "verbose_json",
        granularities=("segment",),
        with_logprobs=False,
        language=None,
        temperature=0.5,
    )
    told = [(one["text"], one["avg_logprob"], one["temperature"]) for one in json.loads(answer.body)["segments"]]
    assert told == [("one two.", round(np.log(0.5) / 2, 4), 0.5), ("three", round(np.log(0.25), 4), 0.5)]


def test_a_language_is_one_of_those_in_the_models_name():
    two, one, unknown = (SimpleNamespace(name=name) for name in ("kyutai/stt-1b-en_fr", "kyutai/stt-2.6b-en", "digits"))
    assert [check_language(None, model, "language") for model in (two, one, unknown)] == [None, "en", None]
    for told, model in (("fr", two), ("fr-CA", two), ("en_US", one), ("de", unknown)):
        assert check_language(told, model, "language") == told
    for told, model, said in (
        ("de", two, "language is 'de'; expected one of en, fr, the languages of kyutai/stt-1b-en_fr"),
        ("French", unknown, "language is 'French'; expected a code of ISO 639 such as en"),
        ("", two, "language is ''; expected a code of ISO 639"),
    ):
        with pytest.raises(ApiError, match=said) as caught:
            check_language(told, model, "language")
        assert caught.value.param == "language"


@pytest.mark.parametrize(
    ("known", "name"),
    [
        *(("en", name) for name in ("kyutai/stt-2.6b-en-trfs", "models/stt-2.6b-en", "stt-2.6b-en", "stt-2.6b-en-2")),
        *((None, name) for name in ("digits-ft", "me/digits-hf", "stt-it", "stt-1b-v_ok", "me/stt-1b-en-ft", "asr-en")),
    ],
)
def test_only_a_published_name_tells_languages(known, name):
    model = SimpleNamespace(name=name)
    assert check_language(None, model, "language") == known
    if known is None:
        assert check_language("de", model, "language") == "de"
    else:
        with pytest.raises(ApiError, match=f"language is 'de'; expected one of en, the languages of {name}"):
            check_language("de", model, "language")


@pytest.mark.parametrize("form", ["mp3", "opus", "flac", "wav", "pcm"])
def test_an_encoder_gives_the_same_bytes_for_any_pieces(form):
    pcm_T = (0.3 * np.sin(np.arange(30_000) / 20)).astype(np.float32)
    files = []
    for size in (1920, 777):
        encoder = SoundEncoder(form, 24_000)
        data = b"".join(encoder.encode(pcm_T[at : at + size]) for at in range(0, pcm_T.size, size))
        files.append(data + encoder.finish())
        assert encoder.finish() == b""
        assert not encoder.is_slow or encoder.encode(pcm_T) == b""  # of a client that has left meanwhile
    assert files[0] == files[1] or form == "opus"  # the serial number of an Ogg stream is drawn by lot
    assert len(files[0]) == len(files[1])


def test_voices_are_those_of_the_model_that_is_named():
    one, other, ears = (
        SimpleNamespace(name=name, kind=kind, service=SimpleNamespace(voices=[f"{name}'s"], default_voice=None))
        for name, kind in (("one", "tts"), ("other", "tts"), ("ears", "stt"))
    )
    server = SimpleNamespace(models=[ears, one, other], find=lambda kind, name: {"alias": other}.get(name))

    def listed(**query: str) -> list[str]:
        answer = asyncio.run(routes.voices(SimpleNamespace(query_params=query), server))
        return [voice["id"] for voice in json.loads(answer.body)["data"]]

    assert (listed(), listed(model="alias")) == (["one's", "other's"], ["other's"])
    with pytest.raises(ApiError, match=r"the model 'none' is not served here; it has one, other$"):
        listed(model="none")


def test_a_client_that_leaves_while_it_asks_is_no_fault(caplog):
    async def left(*_):
        raise ClientDisconnect

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "query_string": b""}
    endpoint = routes._Endpoint(SimpleNamespace(refusal=lambda request: None), {"GET": left})
    asyncio.run(endpoint(scope, None, None))
    assert caplog.records == []


def test_samples_of_16_bits_are_clipped_and_their_header_tells_what_they_are():
    loud_T = np.array([2.0, 1.0, -1.0, -2.0], np.float32)
    assert samples(pcm16(loud_T)).tolist() == [32767, 32767, -32767, -32767]
    assert struct.unpack("<IHHIIHH", wav_header(24_000)[16:36]) == (16, 1, 1, 24_000, 48_000, 2, 16)
    sine_T = 2 * np.sin(np.arange(48_000) / 20)
    assert mp3(sine_T) == mp3(np.clip(sine_T, -1, 1))


def mp3(pcm_T: np.ndarray) -> bytes:
    encoder = SoundEncoder("mp3", 24_000)
    return encoder.encode(pcm_T.astype(np.float32)) + encoder.finish()


def test_the_length_of_an_mp3_tells_its_duration():
    noise_T = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    assert len(mp3(noise_T)) == len(mp3(0 * noise_T))


def test_a_file_is_not_closed_while_samples_are_encoded():
    encoder = SoundEncoder("flac", 24_000)
    ending = threading.Thread(target=encoder.finish)
    with encoder._lock:
        ending.start()
        ending.join(0.1)
        assert ending.is_alive()
    ending.join()


def test_what_is_written_over_earlier_bytes_is_dropped():
    pipe = _Pipe()
    pipe.write(b"abc")
    assert (pipe.seek(1), pipe.write(b"x"), pipe.seek(1, 1), pipe.tell()) == (1, 1, 3, 3)
    pipe.write(b"d")
    assert (pipe.seek(-4, 2), pipe.write(b"y"), pipe.seek(0, 2), pipe.write(b"e")) == (0, 1, 4, 1)
    assert (pipe.take(), pipe.take()) == (b"abcde", b"")


def test_an_error_of_the_library_has_its_status():
    assert api_error(dsm_jax.DsmError("x")).status == 400
    assert api_error(KeyError("x")).status == 500
    assert "x" not in str(api_error(KeyError("x")))
    with pytest.raises(ApiError, match="the body is JSON and no object; send a JSON object"):
        parse_object("5", "the body")
