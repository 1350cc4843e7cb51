"""Run a server: load and warm up, listen, drain on SIGTERM, log lines."""

import asyncio
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from types import FrameType

import uvicorn

from dsm_jax.errors import ConfigError
from dsm_jax.serving.app import make_app
from dsm_jax.serving.config import ServerConfig
from dsm_jax.serving.connections import MESSAGE_BYTES, PING_S, PONG_S, PatientHttp, PatientSocket
from dsm_jax.serving.server import Server

_KERNEL_BUFFER = 256 << 10  # of each socket: megabytes of audio in it would hide that a client is not read

_SWITCH_S = 0.0005
# Errors that uvicorn logs for a handshake that is answered by another status, and for an answer that is cut off, for
# which the library has a line of its own.
_KNOWN = ("ASGI callable returned without completing handshake", "ASGI callable returned without completing response")

_log = logging.getLogger("dsm_jax.serving")


class JsonLines(logging.Formatter):
    """Format each record as one line of JSON; a message that is a JSON object is merged into it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        message = record.getMessage()
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        try:
            facts = json.loads(message)
        except ValueError:
            facts = None
        line |= facts if isinstance(facts, dict) else {"message": message}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logs(log_format: str, level: int = logging.INFO) -> None:
    """Send the library's and uvicorn's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    for name in ("dsm_jax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    # Lines below warnings hold addresses, and keys stand in some of these.
    web = logging.getLogger("uvicorn.error")
    web.setLevel(logging.WARNING)
    web.addFilter(lambda record: not record.getMessage().startswith(_KNOWN))
    logging.getLogger("uvicorn.access").disabled = True


def listening_socket(host: str, port: int) -> socket.socket:
    """Bind the server's socket.

    Raises:
      ConfigError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listener.setsockopt(socket.SOL_SOCKET, buffer, _KERNEL_BUFFER)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter of names that no DNS can hold
        of_host = isinstance(error, (socket.gaierror, UnicodeError)) or error.errno == errno.EADDRNOTAVAIL
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({getattr(error, 'strerror', error)}); "
            f"choose another {'host' if of_host else 'port'}"
        ) from None
    return listener


def serve(config: ServerConfig, *, on_ready: Callable[[Server, str], None] = lambda server, url: None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code: 0, or 1 after a fault.

    Args:
      config: settings.
      on_ready: called with the server and its address once it listens.

    Raises:
      DsmError: a model cannot be loaded, or the address cannot be bound.
    """
    config.check_access()
    # numpy gives the interpreter up within its calls; the event loop would wait 5 ms to have it back from the engine.
    sys.setswitchinterval(_SWITCH_S)
    listener = listening_socket(config.host, config.port)
    try:
        server = Server(config, metadata.version("dsm_jax"))
        server.load()
        # Python would look through all that loading and compiling have made, again and again: 0.2 s in which no frame
        # is heard.
        gc.collect()
        gc.freeze()
        code = asyncio.run(_serve(server, listener, on_ready))
        if server.stuck:
            # Python's own end would wait for the device. Whoever keeps the process running can start it again.
            logging.shutdown()
            os._exit(code)
        return code
    finally:
        listener.close()


def check(config: ServerConfig, write: Callable[[str], None]) -> int:
    """Load and warm up all models and write what each can do; return the exit code, 1 for one that does not keep up.

    Raises:
      DsmError: as for `serve`.
    """
    config.check_access()
    server = Server(config, metadata.version("dsm_jax"))
    server.load()
    for served in server.models:
        write(f"{served.capacity()}\n")
    return 0 if all(served.keeps_up for served in server.models) else 1


async def _serve(server: Server, listener: socket.socket, on_ready: Callable[[Server, str], None]) -> int:
    settings = uvicorn.Config(
        make_app(server),
        http=PatientHttp,
        ws=PatientSocket,
        ws_max_size=MESSAGE_BYTES,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PONG_S,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    web = _Web(settings, server)
    server.end = web.end_now
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    running = asyncio.ensure_future(web.serve(sockets=[listener]))
    while not web.started and not running.done():
        await asyncio.sleep(0.01)
    if web.started:
        on_ready(server, f"http://{address}:{port}")
    await running
    return 1 if server.faulty else 0


class _Web(uvicorn.Server):
    """uvicorn with a drain before its own end, which closes all websockets at once."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server, self._draining, self._hurried = server, False, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal, hurry at a second SIGTERM, end at the next."""
        if self._hurried or not self._server.ready:
            self.end_now()
            return
        began, self._draining = self._draining, True
        seconds = self._server.config.drain_s if sig == signal.SIGTERM and not began else 0.0
        self._hurried = seconds == 0
        _log.info("ending: sessions have %.0f s left", seconds)
        loop = self._server.loop
        assert loop is not None
        if began:
            loop.call_soon_threadsafe(self._server.hurry)
        else:
            loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain(seconds)))

    async def _drain(self, seconds: float) -> None:
        start = time.monotonic()
        await self._server.drain(seconds)
        _log.info("drained in %.1f s", time.monotonic() - start)
        self.end_now()

    def end_now(self) -> None:
        """End without waiting for anybody."""
        self.should_exit = True
        self.force_exit = self._server.faulty or self.force_exit
