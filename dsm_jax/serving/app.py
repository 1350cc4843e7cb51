"""The web application: routes of all dialects, health, metrics and the page."""

import contextlib
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from dsm_jax.serving.access import Refusal
from dsm_jax.serving.moshi import routes as moshi
from dsm_jax.serving.openai import realtime
from dsm_jax.serving.openai import routes as openai
from dsm_jax.serving.server import Server
from dsm_jax.serving.services import Served

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", _PAGE_POLICY.encode()),
    (b"permissions-policy", b"microphone=(self)"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
PAGE = (
    *("index.html", "page.css", "icon.svg"),
    *(
        "dom.js",
        "hearing.js",
        "listen.js",
        "page.js",
        "resample.js",
        "server.js",
        "speak.js",
        "transcript.js",
        "wav.js",
    ),
    *("wire.js", "worklet.js"),
)


def make_app(server: Server) -> Starlette:
    """Make the application of a server whose models are loaded."""
    routes: list[BaseRoute] = []
    for served in server.models:
        socket, post = (
            (moshi.transcribe_socket, moshi.transcribe_file)
            if served.kind == "stt"
            else (moshi.speak_socket, moshi.speak_file)
        )
        routes.append(WebSocketRoute(served.settings.path, _socket(socket, server, served)))
        routes.append(Route(served.settings.path, _post(post, server, served), methods=["POST"]))

    def answer(
        path: str,
        content: Callable[[Request], Response],
        refuse: Callable[[Request], Refusal | None] = lambda request: None,
    ) -> None:
        async def endpoint(request: Request) -> Response:
            refusal = refuse(request)
            return content(request) if refusal is None else moshi.refusal_response(refusal)

        routes.append(Route(path, endpoint, methods=["GET"]))

    answer("/api/build_info", lambda _: JSONResponse(moshi.build_info(server)), server.refusal)
    answer("/api/modules_info", lambda _: JSONResponse(moshi.modules_info(server)), server.refusal)
    answer("/livez", lambda _: _health(server.alive(), "an engine does not run"))
    answer("/readyz", lambda _: _health(server.accepting, "the server takes no sessions"))
    if server.config.metrics:
        answer(
            "/metrics",
            lambda _: Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"),
            server.refusal_of_host,  # and no key, as who scrapes has none: how much is said is no page's business
        )
    routes += openai.routes(server)
    routes += realtime.routes(server)
    if server.config.page:
        for name in PAGE:
            answer("/" if name == "index.html" else f"/{name}", _page_file(name))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            server.stop()

    async def left(socket: Any, error: Exception) -> None:
        """Do nothing for a websocket whose client has left before its session began."""

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={WebSocketDisconnect: left})
    if server.config.origins:
        # Before the check of keys, as browsers send none with the question whether a page may send one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.config.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
        )
    app.add_middleware(_WithHeaders)
    return app


def _health(good: bool, otherwise: str) -> Response:
    return PlainTextResponse("ok") if good else PlainTextResponse(otherwise, 503)


def _socket(
    handler: Callable[[WebSocket, Server, Served], Awaitable[None]], server: Server, served: Served
) -> Callable[[WebSocket], Awaitable[None]]:
    async def endpoint(socket: WebSocket) -> None:
        await handler(socket, server, served)

    return endpoint


def _post(
    handler: Callable[[Request, Server, Served], Awaitable[Response]], server: Server, served: Served
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request, server, served)
        except ClientDisconnect:
            return Response(status_code=400)  # for nobody

    return endpoint


def _page_file(name: str) -> Callable[[Request], Response]:
    """Return a file of the page; it is read once."""
    content = (resources.files("dsm_jax.serving") / "page" / name).read_bytes()
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return lambda _: Response(content, media_type=kind, headers={"cache-control": "no-cache"})


class _WithHeaders:
    """Add the headers of the page's safety to every answer."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers)
