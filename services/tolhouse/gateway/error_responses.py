"""Errors in OpenAI's form, with their HTTP statuses."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tolhouse.errors import Internal, TolhouseError
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
        error = Internal(f"internal error; the log has the details of request {request_id}")
    return error.http_status, str(error)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    status, message = status_and_message(error, request.state.request_id)
    return error_response(message, status)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(str(error.detail), error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What was wrong with a body or a path, and what is allowed."""
    assert isinstance(error, RequestValidationError)
    # of a list of alternatives, the one that fitted best
    found = max(error.errors(), key=lambda e: len(e["loc"]))
    _, *inside = map(str, found["loc"])
    param = inside[0] if inside and not inside[0].isdigit() else None
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "json_invalid":
        message = f"the body is not valid JSON: {found.get('ctx', {}).get('error', message)}"
    elif found["type"] == "extra_forbidden" and len(inside) == 1:
        field = request.scope["route"].body_field.field_info.annotation
        message = f"unknown parameter {param!r}; known are {', '.join(field.model_fields)}"
    elif found["type"] == "missing" and param and len(inside) == 1:
        message = f"parameter {param!r} is required"
    elif param in _FORMS:
        message = f"{param} must be {_FORMS[param]}"
    elif param:
        message = f"{'.'.join(inside)}: {message}"
    elif found["type"] != "value_error":
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    return JSONResponse(error_body(message, 400, param), 400)


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(TolhouseError, _failed)
    app.add_exception_handler(Exception, _failed)
