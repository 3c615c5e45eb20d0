"""Errors in OpenAI's form, with their HTTP statuses."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tolhouse.errors import InternalError, TolhouseError
from tolhouse.logs import log

MAX_MESSAGE = 1000  # characters
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# of a parameter with several forms, pydantic's message is about one of them
_FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "a text, or a list of at most 32 texts, each of at most 512 characters",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    # half a surrogate pair, quoted from a body, can't be sent
    message = message.encode(errors="backslashreplace").decode()
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} …"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    message: str, status: int, headers: Mapping[str, str] | None = None, *, retry_after: float = 1
) -> JSONResponse:
    retry = {"Retry-After": str(math.ceil(retry_after))} if status in (429, 503) else {}
    return JSONResponse(error_body(message, status), status, {**retry, **(headers or {})})


def status_and_message(error: Exception, request_id: str) -> tuple[int, str]:
    """A defect of ours is logged whole and reported in a line."""
    if not isinstance(error, TolhouseError):
        log.error("internal error", exc_info=error, extra={"fields": {"request_id": request_id}})
        error = InternalError(f"internal error; the log has the details of request {request_id}")
    return error.http_status, str(error)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Exception)
    @app.exception_handler(TolhouseError)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        status, message = status_and_message(error, request.state.request_id)
        return error_response(message, status)

    @app.exception_handler(HTTPException)
    async def _refused(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # of a list of alternatives, the one that fitted best
        found = max(error.errors(), key=lambda e: len(e["loc"]))
        (_, *inside), kind = map(str, found["loc"]), found["type"]
        param = inside[0] if inside and not inside[0].isdigit() else None
        message = found["msg"].removeprefix("Value error, ")
        if kind == "json_invalid":
            message = f"the body is not valid JSON: {found['ctx']['error']}"
        elif kind == "extra_forbidden" and len(inside) == 1:
            body = request.scope["route"].body_field.field_info.annotation
            message = f"unknown parameter {param!r}; known are {', '.join(body.model_fields)}"
        elif kind == "missing" and len(inside) == 1:
            message = f"parameter {param!r} is required"
        elif param in _FORMS:
            message = f"{param} must be {_FORMS[param]}"
        elif param:
            message = f"{'.'.join(inside)}: {message}"
        elif kind != "value_error":
            message = "the body must be a JSON object, sent with Content-Type: application/json"
        return JSONResponse(error_body(message, 400, param), 400)
