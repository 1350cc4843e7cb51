"""Operation of a server: who may connect, how it ends, what it logs, and clients that do not keep up."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jax
import msgpack
import numpy as np
import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close

import dsm_jax
from dsm_jax import audio
from dsm_jax.serving import app, run
from dsm_jax.serving.client import links
from dsm_jax.serving.config import ServerConfig
from dsm_jax.serving.encoding import pcm16, wav_header
from dsm_jax.serving.services import Served
from tests.helpers.serving import post, running, served, wait_for

pytestmark = pytest.mark.slow
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
ASR = "/api/asr-streaming"
KEY, OTHER_KEY = "a-key-of-23-characters", "b-key-of-23-characters"


def pack(type: str, **fields) -> bytes:
    return msgpack.packb({"type": type, **fields}, use_single_float=True)


def status(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def handshake(url: str, **settings) -> int:
    """Return the status of a handshake, 101 for one that succeeds."""
    try:
        async with connect(url, **settings):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


@pytest.fixture(scope="module")
def guarded():
    models = [served("stt", "digits", slots=8)]  # a slot is free a moment after its client has gone
    settings = {"keys": (KEY, OTHER_KEY), "origins": ("https://listed.example",), "page": False}
    with running(*models, idle_s=0.6, max_session_s=2.0, **settings) as found:
        yield found


def test_a_key_in_any_of_its_places_lets_a_client_in(guarded):
    url = guarded.socket_url + ASR
    headers = [{"kyutai-api-key": KEY}, {"Authorization": f"Bearer {OTHER_KEY}"}, {"x-api-key": KEY}]
    for given in headers:
        assert asyncio.run(handshake(url, additional_headers=given)) == 101
    assert asyncio.run(handshake(f"{url}?auth_id={KEY}")) == 101
    assert status(guarded.url + "/api/modules_info", kyutai_api_key=KEY) == 200


def test_without_a_right_key_nobody_is_let_in(guarded):
    url = guarded.socket_url + ASR
    wrong = "x" * len(KEY)
    assert asyncio.run(handshake(url)) == 401
    assert asyncio.run(handshake(f"{url}?auth_id={wrong}")) == 401
    # A header counts alone, as in moshi-server.
    assert asyncio.run(handshake(f"{url}?auth_id={KEY}", additional_headers={"kyutai-api-key": wrong})) == 401
    assert status(guarded.url + "/api/modules_info") == status(guarded.url + "/api/build_info") == 401
    assert status(guarded.url + "/api/modules_info", kyutai_api_key=wrong) == 401
    request = urllib.request.Request(guarded.url + ASR, b"audio", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    with refused.value:
        assert (refused.value.code, refused.value.read()) == (401, b"")


@pytest.mark.parametrize("path", [ASR, "/api/modules_info", "/v1/models"])
@pytest.mark.parametrize(("headers", "code", "reason"), [({}, 401, "key"), ({"origin": "null"}, 403, "origin")])
def test_each_client_that_is_not_let_in_is_counted(guarded, path, headers, code, reason):
    def count() -> float:
        return guarded.server.metrics.registry.get_sample_value("dsm_refused_total", {"reason": reason}) or 0.0

    before = count()
    request = urllib.request.Request(guarded.url + path, b"audio" if path == ASR else None, headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    with refused.value:
        assert refused.value.code == code
    assert count() == before + 1


def test_health_needs_no_key(guarded):
    assert status(guarded.url + "/livez") == status(guarded.url + "/readyz") == 200


def test_pages_of_other_origins_may_not_connect(guarded):
    url = f"{guarded.socket_url}{ASR}?auth_id={KEY}"
    assert asyncio.run(handshake(url, origin="https://other.example")) == 403
    assert asyncio.run(handshake(url, origin="null")) == 403
    assert asyncio.run(handshake(url, origin="https://listed.example")) == 101
    assert asyncio.run(handshake(url, origin=guarded.url)) == 101


REBOUND = {"host": "evil.example:8080", "origin": "http://evil.example:8080"}  # a page whose name points here now


@pytest.fixture(scope="module")
def keyless():
    with running(served("stt", "digits"), page=False, origins=("https://listed.example",)) as found:
        yield found


def test_a_page_whose_name_points_to_a_server_without_keys_may_not_connect(keyless):
    for path, words in (
        *((path, b"the Host header names") for path in (ASR, "/api/modules_info", "/api/build_info", "/metrics")),
        ("/v1/models", b'"code":"host_not_allowed"'),
    ):
        request = urllib.request.Request(keyless.url + path, b"audio" if path == ASR else None, REBOUND)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        with refused.value:
            assert refused.value.code == 403
            assert words in refused.value.read()
    with sockets.create_connection(keyless.address.rsplit(":", 1)) as raw:
        lines = (f"GET {ASR} HTTP/1.1", "Host: evil.example", "Upgrade: websocket", "Connection: Upgrade")
        key = ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", "")
        raw.sendall("\r\n".join((*lines, *key)).encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("host", "code"),
    [("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:1", 200), ("[::1]:8080", 200), ("listed.example", 200),
     ("listed.example:81", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("192.168.0.1", 403),
     ("[::1", 403)],
)  # fmt: skip
def test_a_server_without_keys_is_reached_by_names_of_this_machine_and_of_listed_origins(keyless, host, code):
    assert status(keyless.url + "/v1/models", host=host) == code


def test_health_is_told_by_any_name_and_a_key_lets_in_by_any_name(keyless, guarded):
    for path in ("/livez", "/readyz"):
        assert status(keyless.url + path, host="evil.example") == 200
    for host, code in (("evil.example", 403), ("localhost:9090", 200), ("listed.example", 200)):
        assert status(keyless.url + "/metrics", host=host) == code
    assert status(guarded.url + "/metrics", host="10.1.2.3:8080") == 200
    assert status(guarded.url + "/api/modules_info", host="speech.example", kyutai_api_key=KEY) == 200


@pytest.mark.parametrize("path", ["/livez", "/v1/models", "/nothing"])
def test_every_answer_keeps_a_page_to_what_the_server_gave_it(keyless, path):
    try:
        answer = urllib.request.urlopen(keyless.url + path, timeout=30)
    except urllib.error.HTTPError as refused:
        answer = refused
    with answer:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["permissions-policy"] == "microphone=(self)"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy)
        assert answer.headers["content-type"]
        assert answer.headers["server"] is None


def test_the_files_of_the_page_are_of_their_kinds_and_asked_for_anew():
    kinds = {"html": "text/html", "css": "text/css", "svg": "image/svg+xml", "js": "text/javascript"}
    for name in app.PAGE:
        answer = app._page_file(name)(None)
        assert answer.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]], name
        assert answer.headers["cache-control"] == "no-cache"


def test_a_client_that_leaves_its_post_is_no_fault():
    async def left(*_):
        raise ClientDisconnect

    assert asyncio.run(app._post(left, None, None)(None)).status_code == 400


def closing(url: str, *messages: bytes) -> tuple[list[dict], int | None]:
    async def listen():
        async with connect(url) as socket:
            for message in messages:
                await socket.send(message)
            found = []
            with contextlib.suppress(ConnectionClosed):
                while True:
                    found.append(msgpack.unpackb(await asyncio.wait_for(socket.recv(), 30)))
            return found, socket.close_code

    return asyncio.run(listen())


def test_a_client_that_sends_nothing_is_told_and_closed(guarded):
    found, code = closing(f"{guarded.socket_url}{ASR}?auth_id={KEY}")
    assert found[-1] == {"type": "Error", "message": "nothing was received for 1 s"}
    assert code == 1000


def test_a_session_has_a_longest_time(guarded):
    async def chatter():
        async with connect(f"{guarded.socket_url}{ASR}?auth_id={KEY}") as socket:
            found = []
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await socket.send(pack("Audio", pcm=[0.0] * 100))
                    with contextlib.suppress(TimeoutError):
                        found.append(msgpack.unpackb(await asyncio.wait_for(socket.recv(), 0.1)))
            return found, socket.close_code

    found, code = asyncio.run(chatter())
    assert found[-1] == {"type": "Error", "message": "a session lasts at most 2 s"}
    assert code == 1000


def test_an_engine_that_fails_ends_its_sessions_with_a_code_and_the_server_with_1():
    codes, ready, found = [], threading.Event(), []

    def on_ready(server, url):
        found.extend((server, url))
        ready.set()

    config = ServerConfig(models=(served("stt", "digits"),), port=0, page=False)
    thread = threading.Thread(target=lambda: codes.append(run.serve(config, on_ready=on_ready)))
    thread.start()
    assert ready.wait(300)
    server, url = found

    def broken(*_, **__):
        raise RuntimeError("the device is gone")

    server.models[0].service.transcriber.program.step = broken
    messages, code = closing(url.replace("http", "ws") + ASR, pack("Audio", pcm=[0.0] * 1920))
    thread.join(30)
    assert messages[-1] == {"type": "Error", "message": "the server's engine has failed"}
    assert code == 1011
    assert codes == [1]
    assert not server.alive()


@contextlib.contextmanager
def command(*arguments: str, environment: dict[str, str] | None = None):
    """Run `dsm-jax serve` and yield the process, its address and a list that its errors are added to."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dsm_jax", "serve", "--port", "0", "--no-page", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    lines: list[str] = []
    address = None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"at http://(\S+)", line):
            address = found[1]
            break
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    try:
        yield process, address, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def test_on_sigterm_sessions_end_with_their_last_words_nobody_new_is_let_in_and_neither_keys_nor_words_are_logged():
    clip = audio.read(AUDIO / "digits_jackson.flac")
    wanted = dsm_jax.transcribe(dsm_jax.load("digits"), clip)
    arguments = ("--stt", "digits", "--slots", "2", "--drain-s", "1.5", "--log-format", "json", "--verbose")
    with command(*arguments, environment={"DSM_JAX_API_KEYS": KEY}) as (process, address, lines):
        url = f"ws://{address}{ASR}?auth_id={KEY}"
        assert asyncio.run(handshake(f"ws://{address}{ASR}?auth_id={OTHER_KEY}")) == 401

        async def stream(ready: asyncio.Event):
            async with connect(url, max_size=None) as socket:
                await socket.send(pack("Audio", pcm=clip.tolist()))
                found = []
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        found.append(msgpack.unpackb(await socket.recv()))
                        if sum(message["type"] == "Step" for message in found) == clip.size // 1920:
                            ready.set()
                return found, socket.close_code

        async def drained():
            ready = [asyncio.Event() for _ in range(2)]
            streams = [asyncio.ensure_future(stream(event)) for event in ready]
            for event in ready:
                await event.wait()
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            refused = await handshake(url)
            unready = await asyncio.to_thread(status, f"http://{address}/readyz")
            alive = await asyncio.to_thread(status, f"http://{address}/livez")
            return await asyncio.gather(*streams), refused, unready, alive

        results, refused, unready, alive = asyncio.run(drained())
        assert (refused, unready, alive) == (503, 503, 200)
        assert process.wait(20) == 0
    for found, code in results:
        assert code == 1001
        assert found[-1] == {"type": "Error", "message": "the server is shutting down"}
        assert [message["text"] for message in found if message["type"] == "Word"] == [w.text for w in wanted.words]
        assert sum(message["type"] == "EndWord" for message in found) == len(wanted.words)
    ends = [line for line in lines if '"event": "end"' in line]
    assert len(ends) == 2
    assert all('"reason": "drain"' in line and '"code": 1001' in line for line in ends)
    secrets = f"{KEY}|{OTHER_KEY}|auth_id|\\b({'|'.join(word.text for word in wanted.words)})\\b"
    assert not re.findall(secrets, "".join(lines))
    assert not [line for line in lines if '"level": "error"' in line or "Traceback" in line]


def test_a_second_sigterm_asks_for_last_words_and_a_third_one_ends_the_server(monkeypatch):
    asked = []
    loop = SimpleNamespace(call_soon_threadsafe=lambda call: call())
    server = SimpleNamespace(
        ready=True, faulty=False, loop=loop, config=ServerConfig(drain_s=60.0), hurry=lambda: asked.append("hurry")
    )
    monkeypatch.setattr(run.asyncio, "ensure_future", asked.append)
    monkeypatch.setattr(run._Web, "_drain", lambda self, seconds: seconds)
    for signals, wanted in (
        ((signal.SIGTERM,) * 3, [60.0, "hurry", "end"]),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGINT), [60.0, "hurry", "end"]),
        ((signal.SIGINT,) * 2, [0.0, "end"]),
    ):
        web = run._Web(uvicorn.Config(None), server)
        monkeypatch.setattr(web, "end_now", lambda: asked.append("end"))
        for number in signals:
            web.handle_exit(number, None)
        assert asked == wanted
        asked.clear()
    server.ready, web = False, run._Web(uvicorn.Config(None), server)
    monkeypatch.setattr(web, "end_now", lambda: asked.append("end"))
    web.handle_exit(signal.SIGTERM, None)
    assert asked == ["end"], "a server that is not ready has nobody to wait for"


def test_a_second_sigterm_ends_sessions_with_their_last_words_and_uploads_with_503():
    long = wav_header(24_000) + pcm16(np.resize(audio.read(AUDIO / "digits_jackson.flac"), 1200 * 24_000))
    arguments = ("--stt", "digits", "--slots", "2", "--drain-s", "60", "--log-format", "json", "--verbose")
    with command(*arguments) as (process, address, lines):

        def counted(words: str, count: int):
            wait_for(lambda: sum(words in line for line in lines) == count)

        async def held():
            async with connect(f"ws://{address}{ASR}") as socket:
                await socket.recv()
                upload = asyncio.ensure_future(asyncio.to_thread(post, f"http://{address}{ASR}", long))
                # A server that is ending refuses a recording that is still on its way.
                await asyncio.to_thread(counted, '"event": "start"', 2)
                process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(counted, "ending: sessions have 60 s left", 1)
                await asyncio.sleep(0.3)
                assert process.poll() is None
                assert not upload.done()
                start = time.monotonic()
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await asyncio.wait_for(socket.recv(), 20)
                code = await asyncio.to_thread(process.wait, 20)
                return socket.close_code, (await upload)[0], code, time.monotonic() - start

        *codes, seconds = asyncio.run(held())
        assert codes == [1001, 503, 0]
        assert seconds < 5  # the interpreter's own end takes a moment
    assert "Traceback" not in "".join(lines)


def test_our_clients_tell_what_a_bare_close_code_means():
    told = links.closed(links.address("http://here"), ConnectionClosed(Close(1012, ""), None))
    assert str(told) == "http://here closed the connection midway (1012: service restart)"


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--host", "0.0.0.0"], "would listen on 0.0.0.0 without keys; give --api-key-file FILE or the variable"),
        (["--api-key-file", "/no/file"], "the keys in /no/file cannot be read"),
        (["--config", "/no/file.toml"], "there is no configuration file /no/file.toml; give the path of a TOML file"),
        (["--stt", "digits-tts"], "digits-tts is a text-to-speech model; to transcribe, load"),
        (["--tts", "digits"], "digits is a speech-to-text model; to speak, load"),
        (["--slots", "5000", "--stt", "digits"], "digits has 5000 slots; expected 1 to 4096"),
        (
            ["--slots", "2", "--tts", "digits-tts"],
            "--slots 2 is for a model that --stt names, and none is named; name it",
        ),
        (["--voice-folder", "v", "--stt", "digits"], "or set voice_folder in the model's part of the --config file"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_served(arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "dsm_jax", "serve", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())


def test_check_prints_what_the_machine_can_do_and_serves_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "dsm_jax", "serve", "--check", "--stt", "digits", "--slots", "2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert re.fullmatch(r"digits: 2 slots at \d+ ms a step; (keeps up|does not keep up .*)\n", done.stdout), done.stderr
    assert done.returncode == (0 if "keeps up" in done.stdout else 1)


@pytest.mark.parametrize("start", [run.serve, lambda config: run.check(config, print)], ids=["serve", "check"])
def test_a_server_that_others_reach_without_keys_does_not_start(monkeypatch, start):
    for name in ("listening_socket", "Server"):
        monkeypatch.setattr(run, name, lambda *_: pytest.fail("it has started"))
    with pytest.raises(dsm_jax.ConfigError, match=r"would listen on 0\.0\.0\.0 without keys"):
        start(ServerConfig(host="0.0.0.0"))


def test_what_loading_has_made_is_not_looked_through_while_sessions_run(monkeypatch):
    made, frozen = [], []

    async def served(*_) -> int:
        frozen.append(gc.get_freeze_count())
        assert not any(made is one for one in gc.get_objects()), "a collection would look at it"
        return 0

    monkeypatch.setattr(run, "Server", lambda *_: SimpleNamespace(load=lambda: made.append([]), stuck=False))
    monkeypatch.setattr(run, "_serve", served)
    assert any(made is one for one in gc.get_objects())
    try:
        assert run.serve(ServerConfig(port=0)) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 0


def test_the_check_fails_for_one_model_that_does_not_keep_up(monkeypatch):
    models = [SimpleNamespace(capacity=lambda text=text: text, keeps_up=text == "quick") for text in ("quick", "slow")]
    for count, code in ((2, 1), (1, 0)):
        server, written = SimpleNamespace(load=lambda: None, models=models[:count]), []
        monkeypatch.setattr(run, "Server", lambda *_, server=server: server)
        assert run.check(ServerConfig(), written.append) == code
        assert written == ["quick\n", "slow\n"][:count]


def test_a_line_of_the_log_is_json_with_the_fields_of_its_message():
    def line(message: str, fault=None) -> dict:
        record = logging.LogRecord("dsm_jax.serving", logging.WARNING, "", 1, message, (), fault)
        text = run.JsonLines().format(record)
        assert text.isprintable()
        assert "\\u" not in text
        found = json.loads(text)
        assert found.pop("time") == pytest.approx(record.created, abs=1e-3)
        assert (found.pop("level"), found.pop("logger")) == ("warning", "dsm_jax.serving")
        return found

    assert line("café") == {"message": "café"}
    assert line('{"event": "end", "frames": 2}') == {"event": "end", "frames": 2}
    assert line("[1]") == {"message": "[1]"}
    try:
        raise RuntimeError("the cause")
    except RuntimeError:
        told = line("failed", sys.exc_info())
    assert told["message"] == "failed"
    assert told["error"].endswith("RuntimeError: the cause")


def test_the_log_has_each_line_once_and_no_addresses(monkeypatch, capsys):
    library, web, error, access = map(logging.getLogger, ("dsm_jax", "uvicorn", "uvicorn.error", "uvicorn.access"))
    for logger in (library, web):
        for name in ("handlers", "level", "propagate"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
        monkeypatch.setattr(logger, "handlers", [])
    for name in ("level", "filters"):
        monkeypatch.setattr(error, name, list(error.filters) if name == "filters" else error.level)
    monkeypatch.setattr(access, "disabled", access.disabled)
    for form in ("text", "json"):
        run.set_up_logs(form)
    logging.getLogger("dsm_jax.serving").info("a session has begun")
    error.info("127.0.0.1 - connection open")
    for known in run._KNOWN:
        error.error(f"{known}.")
    error.error("a fault")
    access.warning("GET /?auth_id=a-key")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["a session has begun", "a fault"]
    assert (library.propagate, web.propagate) == (False, False)


def test_a_socket_holds_little_audio_and_can_be_bound_again_at_once(monkeypatch):
    monkeypatch.setattr(run, "_KERNEL_BUFFER", 8192)
    with run.listening_socket("127.0.0.1", 0) as listener:
        for buffer in (sockets.SO_RCVBUF, sockets.SO_SNDBUF):
            assert listener.getsockopt(sockets.SOL_SOCKET, buffer) <= 2 * run._KERNEL_BUFFER  # Linux doubles it
        assert listener.getsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR)


def test_a_port_that_is_taken_is_refused():
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = rf"127.0.0.1:{port} cannot be listened on \(Address already in use\); choose another port"
        with pytest.raises(dsm_jax.ConfigError, match=words):
            run.serve(ServerConfig(port=port))


# An interface that is not here, an address of another machine, and no name at all; none of them is looked up.
@pytest.mark.parametrize("host", ["fe80::1%nowhere", "192.0.2.1", "a..b"])
def test_a_host_that_is_not_here_is_refused_as_the_host(host):
    with pytest.raises(dsm_jax.ConfigError, match=rf"{host}:0 cannot be listened on \(.+\); choose another host"):
        run.listening_socket(host, 0)


@pytest.mark.parametrize(
    ("kind", "slots", "groups", "step", "sentence"),
    [
        ("stt", 8, 1, {1: 0.063}, "m: 8 slots at 63 ms a step; keeps up"),
        (
            "stt",
            8,
            1,
            {1: 0.071},
            "m: 8 slots at 71 ms a step; does not keep up with 80 ms a frame: use fewer, or int8",
        ),
        (
            "stt",
            *(1, 1),
            {1: 0.071, 4: 0.1},
            "m: 1 slot at 71 ms a step; does not keep up with 80 ms a frame: use a smaller model or a faster ",
        ),
        ("stt", 64, 2, {1: 0.031}, "m: 64 slots at 62 ms a step; keeps up"),
        ("stt", 64, 2, {1: 0.036}, "m: 64 slots at 72 ms a step; does not keep up with 80 ms a frame: use fewer"),
        ("tts", 2, 1, {4: 0.1}, "m: 2 slots at 100 ms for 4 steps; keeps up, 6.4 times real time in all"),
    ],
)
def test_the_capacity_leaves_time_for_the_connections(kind, slots, groups, step, sentence):
    def served(**model) -> Served:
        model = SimpleNamespace(**{"quantize": None, "devices": jax.devices("cpu")} | model)
        service = SimpleNamespace(step_seconds=step, model=model)
        engine = SimpleNamespace(total=slots, group_count=groups)
        return Served(None, "m", kind, service, engine)

    assert served().capacity().startswith(sentence)
    assert served().keeps_up == ("; keeps up" in sentence)
    assert "int8" not in served(quantize="int8").capacity()
    assert "int8" not in served(devices=[SimpleNamespace(platform="gpu")]).capacity()
