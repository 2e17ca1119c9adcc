"""What a client is told when something goes wrong: one shape, no paths and no tracebacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from atoma_jax import AtomaError, EngineDeadError, Overloaded, UserError

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
}
_SHOWN = 200  # characters of a value that come back in its own error


class Problem(AtomaError):  # noqa: N818  an answer, whose status says how grave it is
    """An answer other than the one asked for.

    Attributes:
        status: of HTTP.
        param: the field at fault, None where it is none.
        retry_after: seconds until another try may do better, None where it never will.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: float | None = None):
        """`message` goes to the client as it is."""
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers())


class ClientGone(AtomaError):  # noqa: N818  nobody is left to be told of an error
    """The client closed its connection."""


def problem_of(error: Exception) -> Problem:
    """What a client is told of an exception."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Overloaded):
        return Problem(429, str(error), retry_after=error.retry_after)
    if isinstance(error, UserError):
        return Problem(400, str(error), param=error.field)
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, EngineDeadError):  # its message may hold whatever the device said
        return Problem(500, "The engine is lost and the server is about to end. Its log says why.")
    return Problem(500, "The server failed. Its log says why, under this answer's X-Request-Id.")


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    first: Mapping[str, Any] = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first.get("type") == "json_invalid":
        return Problem(400, f"The body is no valid JSON: {first.get('ctx', {}).get('error', 'it cannot be parsed')}.")
    field = ".".join(place) or "body"
    return Problem(400, f"{field}: {first['msg']}, got {_shown(first.get('input'))}.", param=field)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):  # may be of any size and depth
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
