"""Reach a server: addresses, keys, requests over HTTP and websockets, and a helpful sentence for each that fails."""

import asyncio
import contextlib
import dataclasses
import http.client
from collections.abc import AsyncIterator, Iterator, Mapping
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CLOSE_CODE_EXPLANATIONS

from dsm_jax import files
from dsm_jax.errors import ConfigError, ServerError, ServerFullError
from dsm_jax.tokenizers import check_characters

OPEN_S = 10.0  # in which a connection is open
ANSWER_S = 600.0  # in which an answer over HTTP goes on
MESSAGE_BYTES = 16 << 20  # of a server
# Of a connection: an answer to a server's ping stands behind all that it holds, and the server waits 20 s for it.
_KERNEL_BUFFER = 256 << 10
_PONG_S = 120.0  # that a server may take to answer a ping behind audio that it does not read yet
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
_SECURE = "https"


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of a server.

    Attributes:
      scheme: "http" or "https".
      host: name or number, with its port.
      prefix: path before those of the server, such as "/speech" behind a proxy; mostly empty.
    """

    scheme: str
    host: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.prefix}"

    def socket_url(self, path: str, query: Mapping[str, str | None]) -> str:
        """Return the address of a websocket; query values that are None are left out.

        Raises:
          TextError: a value has half of a character in it.
        """
        for value in query.values():
            check_characters(value or "")
        given = urlencode({key: value for key, value in query.items() if value is not None})
        return f"ws{'s' if self.scheme == _SECURE else ''}://{self.host}{self.prefix}{path}{'?' * bool(given)}{given}"


def address(url: str) -> Address:
    """Read an address: with http, https, ws or wss, or a host and its port alone.

    >>> str(address("127.0.0.1:8080")), str(address("wss://example.org/speech/"))
    ('http://127.0.0.1:8080', 'https://example.org/speech')

    Raises:
      ConfigError: it is none.
    """
    if not url.strip():
        raise ConfigError("the address of the server is empty; give one such as http://127.0.0.1:8080")
    parts = None
    with contextlib.suppress(ValueError):
        found = urlsplit(url if "://" in url else f"http://{url}")
        (found.hostname or "").encode("idna")  # as the connection will, which raises for parts that no name can have
        is_one_word = url.isprintable() and not any(letter.isspace() for letter in url) and found.path.isascii()
        if found.scheme in _SCHEMES and found.hostname and found.port != 0 and not found.query and is_one_word:
            parts = found
    if parts is None or "@" in parts.netloc:  # a name and a password are not used, and are not repeated
        raise ConfigError("this is no address of a server; give one such as http://127.0.0.1:8080")
    return Address(_SCHEMES[parts.scheme], parts.netloc, parts.path.rstrip("/"))


def _headers(api_key: str | None) -> dict[str, str]:
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("the API key has characters that a header cannot hold; check where it was copied from")
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def refusal(
    server: Address, path: str, status: int, headers: Mapping[str, str] | http.client.HTTPMessage, body: bytes
) -> ServerError:
    """Return the error for an answer that is not the one that was asked for.

    Args:
      server: address of the server.
      path: of the request.
      status: of HTTP.
      headers: of the answer; names in any case.
      body: of the answer.
    """
    kind = headers.get("content-type", "")
    said = _sentence(kind, body)
    if status == 401:
        return ServerError(f"{server} asks for a key, and the one given, or none, is not known there; give another")
    if "html" in kind or status < 400:
        what = "a web page" if "html" in kind else f"status {status}"
        return ServerError(
            f"{server}{path} answered with {what}, as no server of speech does; check the address and the port"
        )
    why = said or http.client.responses.get(status, "no reason was given")
    if status == 403:
        return ServerError(f"{server} refuses this client (403): {why}")
    if status == 404 and not said.startswith("the "):
        return ServerError(f"{server} has no {path} (404); check the address, or the kind of the server's models")
    if status == 503:
        after = headers.get("retry-after", "")  # or a date, for which nobody waits
        return ServerFullError(
            f"{server} takes no more sessions now (503): {why}; try again later",
            float(after) if after.isdecimal() else None,
        )
    return ServerError(f"{server} refused the request ({status}): {why}")


def _sentence(kind: str, body: bytes) -> str:
    """Return the server's own reason; empty for none that a person can read."""
    text = body[:2000].decode("utf-8", "replace").strip()
    if "json" in kind:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = str(files.decode_json(body)["error"]["message"])
    return "" if "html" in kind else text


def unreachable(server: Address, error: BaseException) -> ServerError:
    """Return the error for a connection that could not be made."""
    if isinstance(error, TimeoutError):
        return ServerError(f"{server} did not answer in {OPEN_S:.0f} s; check the address, or the network")
    if isinstance(error, OSError):
        why = error.strerror or str(error) or type(error).__name__
        return ServerError(
            f"{server} cannot be reached ({why}); start a server there with dsm-jax serve, or check the address"
        )
    return ServerError(f"{server} does not answer as a web server does ({error}); check the address and the port")


# Websockets.


@contextlib.asynccontextmanager
async def socket(
    server: Address,
    path: str,
    *,
    query: Mapping[str, str | None],
    api_key: str | None,
) -> AsyncIterator[ClientConnection]:
    """Open a websocket while the block runs.

    Raises:
      ServerError: it cannot be opened, or the server closes it within the block.
    """
    opening = connect(
        server.socket_url(path, query),
        additional_headers=_headers(api_key),
        compression=None,  # samples do not become shorter
        max_size=MESSAGE_BYTES,
        open_timeout=OPEN_S,
        ping_timeout=_PONG_S,
        proxy=None,
    )
    opening.process_redirect = lambda exc: exc  # a key is sent to nobody else
    try:
        opened = await opening
    except InvalidStatus as error:
        answer = error.response
        raise refusal(server, path, answer.status_code, answer.headers, bytes(answer.body or b"")) from None
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI, WebSocketException) as error:
        raise unreachable(server, error) from None
    opened.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, _KERNEL_BUFFER)
    try:
        yield opened
    except ConnectionClosed as error:
        raise closed(server, error) from None
    finally:
        await opened.close()


def closed(server: Address, error: ConnectionClosed) -> ServerError:
    """Return the error for a connection that ended midway."""
    frame = error.rcvd
    if frame is None:
        return ServerError(f"the connection to {server} was lost midway; what was not received is lost: try again")
    why = frame.reason or CLOSE_CODE_EXPLANATIONS.get(frame.code, "for no known reason")
    return ServerError(f"{server} closed the connection midway ({frame.code}: {why})")


# HTTP.


@contextlib.contextmanager
def answer(
    server: Address,
    method: str,
    path: str,
    *,
    body: Any = None,
    headers: Mapping[str, str] = {},
    api_key: str | None = None,
) -> Iterator[http.client.HTTPResponse]:
    """Send a request, and read its answer while the block runs.

    Raises:
      ServerError: the server cannot be reached, refuses the request, or ends its answer midway.
    """
    secure = server.scheme == _SECURE
    link = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(server.host, timeout=OPEN_S)
    try:
        try:
            link.connect()
            link.sock.settimeout(ANSWER_S)
            # A refusal may come before the whole body was sent.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.request(method, server.prefix + path, body, {**headers, **_headers(api_key)})
            found = link.getresponse()
            if found.status != 200 or "html" in found.headers.get_content_type():
                raise refusal(server, path, found.status, found.headers, found.read(1 << 16))
        except (OSError, http.client.HTTPException) as error:
            raise unreachable(server, error) from None
        try:
            yield found
        except (OSError, http.client.HTTPException):
            raise ServerError(f"{server} ended its answer midway; try again") from None
    finally:
        link.close()


def read_json(server: Address, path: str, *, api_key: str | None) -> Any:
    """Return the JSON at a path of the server.

    Raises:
      ServerError: there is none.
    """
    with answer(server, "GET", path, api_key=api_key) as found:
        return parsed(server, path, found.read())


def parsed(server: Address, path: str, body: bytes) -> Any:
    """Return the values of an answer in JSON.

    Raises:
      ServerError: it is no JSON.
    """
    try:
        return files.decode_json(body)
    except ValueError:
        raise ServerError(f"{server}{path} did not answer in JSON; check the address and the port") from None


async def find_path(server: Address, kind: str, model: str | None, *, api_key: str | None) -> tuple[str, str]:
    """Return the path and the server's own name of a model on a server.

    Args:
      server: address of the server.
      kind: "stt" or "tts".
      model: name of the model, or an alias of it; None for the server's first.
      api_key: key of the client.

    Raises:
      ServerError: the server has no such model.
    """
    rows = await asyncio.to_thread(read_json, server, "/api/modules_info", api_key=api_key)
    found: dict[str, str] = {}
    try:
        for row in rows:
            if ("lm" in row) == (kind == "stt"):
                found.setdefault(str(row.get("lm", row.get("script"))), str(row["path"]))
    except (TypeError, AttributeError, KeyError):
        raise ServerError(f"{server} does not list its models as expected; it is another kind of server") from None
    name = next(iter(found), None) if model is None else model
    if name is not None and name not in found:
        name = await asyncio.to_thread(_own_name, server, name, api_key=api_key)
    if name is None or name not in found:
        does = "transcribes" if kind == "stt" else "speaks"
        there = ", ".join(found) or "none"
        asked = f"no model {model!r} that {does}" if model is not None else f"no model that {does}"
        raise ServerError(f"{server} has {asked}; those there are: {there}")
    return found[name], name


def _own_name(server: Address, name: str, *, api_key: str | None) -> str:
    """Return a server's own name of a model that may be named by an alias; the same name if the server knows none."""
    with contextlib.suppress(ServerError, TypeError, KeyError):
        return str(read_json(server, f"/v1/models/{quote(name, errors='replace')}", api_key=api_key)["id"])
    return name
