"""Servers for tests, in this process on a free port of the loopback: ours with the embedded models, and a wrong one."""

import contextlib
import dataclasses
import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from dsm_jax.serving import run
from dsm_jax.serving.config import ServedModel, ServerConfig, default_path
from dsm_jax.serving.server import Server


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, 20 s at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "20 s have passed: do sessions of clients that have left hold slots?"
        time.sleep(0.005)


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs: its state, and its address without the scheme, such as 127.0.0.1:1234."""

    server: Server
    address: str

    @property
    def url(self) -> str:
        """Address of HTTP."""
        return f"http://{self.address}"

    @property
    def socket_url(self) -> str:
        """Address of websockets."""
        return f"ws://{self.address}"

    def wait_until_idle(self) -> None:
        """Wait until no session holds a slot: it is free some milliseconds after its client has closed."""
        wait_for(lambda: not any(model.engine.used for model in self.server.models))


def served(kind: str, model: str, **settings) -> ServedModel:
    # Servers with the same slots share what is compiled, so a test asks for other slots only where it needs them.
    slots = {"stt": 4, "tts": 2}[kind]
    return ServedModel(kind=kind, model=model, path=default_path(kind, 0), **{"slots": slots, **settings})


@contextlib.contextmanager
def running(*models: ServedModel, **settings) -> Iterator[Running]:
    """Run a server with models while the block runs; the settings are those of `ServerConfig`."""
    started, found, faults = threading.Event(), [], []

    def on_ready(server: Server, url: str) -> None:
        found.append(Running(server, url.removeprefix("http://")))
        started.set()

    def serve() -> None:
        try:
            run.serve(ServerConfig(models=models, port=0, **settings), on_ready=on_ready)
        except BaseException as error:
            faults.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    started.wait()
    if faults:
        thread.join()
        raise faults[0]
    try:
        yield found[0]
    finally:
        found[0].server.loop.call_soon_threadsafe(found[0].server.end)
        thread.join(30)
        assert not thread.is_alive()
    if faults:
        raise faults[0]


@contextlib.contextmanager
def answering(status: int, kind: str, body: bytes) -> Iterator[str]:
    """Run a web server that gives one answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            left = int(self.headers.get("content-length", 0))
            while left > 0:
                left -= len(self.rfile.read(min(left, 1 << 16)))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def post(url: str, body: bytes) -> tuple[int, str]:
    """Return the status and the answer to a body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
