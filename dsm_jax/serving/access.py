"""Tell who may use the server: keys, the origins of web pages, and the host that a client means to reach."""

import dataclasses
import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from dsm_jax.serving.config import ServerConfig, is_loopback

_BROWSER_KEY = "openai-insecure-api-key."  # before the key in a browser's list of websocket protocols


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A client that is not let in; each dialect shapes its answer.

    Attributes:
      status: of HTTP.
      reason: word for it, for metrics: "host", "origin", "key", "draining" or "not ready".
      sentence: for the client.
    """

    status: int
    reason: str
    sentence: str


class Keys:
    """The keys of clients; they are kept as digests and compared in constant time.

    Args:
      keys: all keys; none lets everyone in.
    """

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key) for key in keys]

    def allow(self, connection: HTTPConnection) -> bool:
        """Tell whether a connection has a key, or needs none."""
        if not self._digests:
            return True
        given = _digest(_key_of(connection))
        # All digests are compared, so that the time does not tell which one came close.
        return any([hmac.compare_digest(given, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_of(connection: HTTPConnection) -> str:
    """Return the key that a client sent, by the first of the ways that it used; a client without one sent ""."""
    headers = connection.headers
    if (key := headers.get("kyutai-api-key")) is not None:
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    if (key := headers.get("x-api-key")) is not None:
        return key
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if (name := protocol.strip()).startswith(_BROWSER_KEY):
            return name.removeprefix(_BROWSER_KEY)
    return connection.query_params.get("auth_id", "")


def allowed_origin(connection: HTTPConnection, origins: Sequence[str]) -> bool:
    """Tell whether a connection is of no web page, of the server's own, or of a listed one.

    Without this, any page that a user opens could use a server on the user's machine.
    """
    origin = connection.headers.get("origin")
    if origin is None or origin in origins:
        return True
    return urlsplit(origin).netloc.lower() == connection.headers.get("host", "").lower()


def allowed_host(connection: HTTPConnection, config: ServerConfig) -> bool:
    """Tell whether a connection means this server by its Host header, where the header is all that protects the server.

    A page may have its own name point to the loopback after it was loaded (DNS rebinding). To the browser the server is
    of the page's own origin then, and the Host header alone tells the page's name. A server with keys needs no such
    rule, as the page has no key, and neither does one that listens for other machines, under names not known here.
    A proxy may hand the name on that its clients use: that of a listed origin.
    """
    if config.keys or not is_loopback(config.host):
        return True
    host = connection.headers.get("host", "").lower()
    if host in [urlsplit(origin).netloc.lower() for origin in config.origins]:
        return True
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
