"""A server for tests: in this process, on a free port of the loopback, with the embedded models."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from dsm_jax.serving import run
from dsm_jax.serving.config import ServedModel, ServerConfig, default_path
from dsm_jax.serving.server import Server


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


def served(kind: str, model: str, **settings) -> ServedModel:
    return ServedModel(kind=kind, model=model, path=default_path(kind, 0), **{"slots": 4, **settings})


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
