"""Errors of OpenAI's dialect: one shape, whatever went wrong and wherever."""

import json
from typing import Any

from starlette.responses import Response

from dsm_jax.errors import AudioError, DsmError, FullError, PromptError, SpeechError
from dsm_jax.files import decode_json
from dsm_jax.serving.access import Refusal
from dsm_jax.serving.uploads import TooLargeError

# The error's type by its status; others are errors of the request.
_TYPES = {401: "authentication_error", 403: "permission_error", 500: "server_error", 503: "server_error"}
_FAILED = "the server has failed; try again, and tell its operator if it fails again"


class ApiError(DsmError):
    """A request that is refused.

    Attributes:
      status: of HTTP.
      param: the field of the request that is at fault; None for no single one.
      code: word for programs; None where there is none.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def fields(self) -> dict[str, str | None]:
        """Return what clients read: message, type, param and code."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"message": str(self), "type": kind, "param": self.param, "code": self.code}


def unknown_model(name: str, known: list[str], param: str = "model") -> ApiError:
    """Make the error for a model that is not served."""
    there = f"it has {', '.join(known)}" if known else "it has none of this kind"
    return ApiError(f"the model {name!r} is not served here; {there}", status=404, param=param, code="model_not_found")


def invalid_value(param: str, value: object, expected: str) -> ApiError:
    """Make the error for a value that is not supported; one that is long is cut in the message."""
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
    return ApiError(f"{param} is {shown}; expected {expected}", param=param, code="invalid_value")


def refusal_error(refusal: Refusal) -> ApiError:
    """Return the error for a client that is not let in."""
    code = {"host": "host_not_allowed", "origin": "origin_not_allowed", "key": "invalid_api_key"}.get(
        refusal.reason, "server_full"
    )
    return ApiError(refusal.sentence, status=refusal.status, code=code)


def api_error(error: Exception) -> ApiError:
    """Return an error of a request as the client is told it; one that is no fault of the request is not spelled out."""
    match error:
        case ApiError():
            return error
        case TooLargeError():
            return ApiError(str(error), status=413, param="file", code="file_too_large")
        case AudioError():
            return ApiError(str(error), param="file", code="invalid_audio")
        case FullError():
            return ApiError(str(error), status=503, code="server_full")
        case PromptError():
            return ApiError(str(error), param="prompt", code="invalid_value")
        case SpeechError():
            return ApiError(str(error), param="input", code="invalid_value")
        case DsmError():
            return ApiError(str(error), code="invalid_value")
    return ApiError(_FAILED, status=500, code="server_error")


def error_response(error: ApiError) -> Response:
    """Return the answer for an error."""
    headers = {"retry-after": "1"} if error.status == 503 else None
    return json_response({"error": error.fields()}, error.status, headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer in JSON."""
    return Response(json_bytes(content), status, headers, "application/json")


def json_bytes(content: Any) -> bytes:
    """Return values as JSON; what a client sent may hold halves of characters, which no encoding can write."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def parse_object(data: str | bytes, what: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
      ApiError: the data is something else.
    """
    try:
        value = decode_json(data)
    except ValueError:
        raise ApiError(f"{what} is not JSON; send a JSON object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(f"{what} is JSON and no object; send a JSON object", code="invalid_json")
    return value
