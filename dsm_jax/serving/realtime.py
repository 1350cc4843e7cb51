"""OpenAI's realtime dialect for transcription, over a websocket."""

from starlette.routing import BaseRoute

from dsm_jax.serving.server import Server


def routes(server: Server) -> list[BaseRoute]:
    """Return the routes of a server."""
    return []
