"""Errors in OpenAI's form, with their HTTP statuses."""

import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tolhouse.errors import (
    InternalError,
    InvalidArgumentError,
    PromptTooLongError,
    TolhouseError,
    UnsupportedError,
)
from tolhouse.gateway.router import ModelNotFoundError
from tolhouse.logs import log
from tolhouse.sampling import SamplingParams

MAX_MESSAGE = 1000  # characters
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# OpenAI's codes for HTTP statuses, errors, and pydantic's kinds of error.
_OF_STATUS = {401: "invalid_api_key", 404: "unknown_url", 405: "method_not_supported"}
_OF_STATUS |= {429: "rate_limit_exceeded"}
_OF_ERROR: dict[type[TolhouseError], str] = {
    PromptTooLongError: "context_length_exceeded",
    ModelNotFoundError: "model_not_found",
    InvalidArgumentError: "invalid_value",
    UnsupportedError: "unsupported_parameter",
}
_OF_KIND = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "string_too_long": "string_above_max_length",
    "too_long": "array_above_max_length",
    "too_short": "array_below_min_length",
    **dict.fromkeys(("greater_than", "greater_than_equal"), "{}_below_min_value"),
    **dict.fromkeys(("less_than", "less_than_equal"), "{}_above_max_value"),
}
_FORM = re.compile(r"\[|^(constrained-)?str$")  # the name of a form in the location of an error
_FORMS = {  # all forms of a parameter, because pydantic's message names only one
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "a text, or a list of at most 32 texts, each of at most 512 characters",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that reports an error."""

    error: ErrorDetail


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    # Half of a surrogate pair, which a message may quote from a body, can't be encoded.
    message = message.encode(errors="backslashreplace").decode()
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} …"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or _OF_STATUS.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    message: str, status: int, headers: Mapping[str, str] | None = None, *, retry_after: float = 1
) -> JSONResponse:
    retry = {"Retry-After": str(math.ceil(retry_after))} if status in (429, 503) else {}
    return JSONResponse(error_body(message, status), status, {**retry, **(headers or {})})


def status_and_body(error: Exception, state: Any) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of the response to a failed request.

    A defect of the gateway is logged with its traceback, and the response refers to the log.
    """
    if not isinstance(error, TolhouseError):
        fields = {"request_id": state.request_id}
        log.error("internal error", exc_info=error, extra={"fields": fields})
        reference = f"the log has the details of request {state.request_id}"
        error = InternalError(f"internal error; {reference}")
    message, body = str(error), getattr(state, "body", None)
    code = next((c for kind, c in _OF_ERROR.items() if isinstance(error, kind)), None)
    if isinstance(error, PromptTooLongError):  # LangChain searches the message for the code
        message = f"{message} ({code})"
    param = None
    if isinstance(error, ModelNotFoundError):
        param = "model"
    elif isinstance(error, PromptTooLongError) and body:
        param = body.prompt_param
    elif isinstance(error, InvalidArgumentError | UnsupportedError) and body:
        # Messages about sampling parameters name them. Other messages are about the prompt.
        given = SamplingParams.model_fields.keys() & body.model_fields_set
        named = (word for word in re.findall("[a-z_]+", message) if word in given)
        param = next(named, body.prompt_param)
    return error.http_status, error_body(message, error.http_status, param, code)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Exception)
    @app.exception_handler(TolhouseError)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        status, body = status_and_body(error, request.state)
        return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)

    @app.exception_handler(HTTPException)
    async def _refused(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # A union has an error for each of its forms. Report that of the best match.
        found = max(error.errors(), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
        _, *inside = (place for place in map(str, found["loc"]) if not _FORM.search(place))
        kind, context = found["type"], found.get("ctx", {})
        param = inside[0] if inside and not inside[0].isdigit() else None
        message, code = found["msg"].removeprefix("Value error, "), _code(kind, context)
        if kind == "json_invalid":
            message = f"the body is not valid JSON: {context['error']}"
        elif "param" in context:  # schemas.py raised the error
            param, code, place = context["param"], kind, ".".join(inside)
            message = f"{place}: {message}" if place else message
        elif kind == "extra_forbidden" and len(inside) == 1:
            body = request.scope["route"].body_field.field_info.annotation
            message = f"unknown parameter {param!r}; known are {', '.join(body.model_fields)}"
        elif kind == "extra_forbidden":
            message = f"{'.'.join(inside)} is not supported: leave it out"
        elif kind == "missing" and len(inside) == 1:
            message = f"parameter {param!r} is required"
        elif param in _FORMS:
            message = f"{param} must be {_FORMS[param]}"
        elif param:
            message = f"{'.'.join(inside)}: {message}"
        elif kind != "value_error":
            message = "the body must be a JSON object, sent with Content-Type: application/json"
            code = "invalid_type"
        return JSONResponse(error_body(message, 400, param, code), 400)


def _code(kind: str, context: dict[str, Any]) -> str:
    """Return OpenAI's code of an error that pydantic found."""
    decimal = any(isinstance(bound, float) for bound in context.values())
    wrong_type = kind.endswith(("_type", "_parsing", "_from_float"))
    code = _OF_KIND.get(kind, "invalid_type" if wrong_type else "invalid_value")
    return code.format("decimal" if decimal else "integer")
