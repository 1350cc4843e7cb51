"""OpenAI's dialect over HTTP: transcriptions, speech, voices and models."""

from starlette.routing import BaseRoute

from dsm_jax.serving.server import Server


def routes(server: Server) -> list[BaseRoute]:
    """Return the routes of a server."""
    return []
