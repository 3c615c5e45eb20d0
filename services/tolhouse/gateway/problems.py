"""Errors in OpenAI's form, with their HTTP statuses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from tolhouse.errors import Internal, TolhouseError
from tolhouse.logs import log

MAX_MESSAGE = 1000  # characters
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# where a parameter has several forms, what does not fit one of them says little
_FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "a text, or a list of at most 32 texts, each of at most 512 characters",
}


class ProblemDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class Problem(BaseModel):
    """Every answer that is no success: for the API's description, and as `body_of` makes it."""

    error: ProblemDetail


def body_of(message: str, code: int, param: str | None = None) -> dict:
    kind = _KINDS.get(code, "invalid_request_error" if code < 500 else "server_error")
    message = message.encode(
        errors="backslashreplace"
    ).decode()  # half a surrogate pair, quoted from a body, can't be sent
    if len(message) > MAX_MESSAGE:  # it quotes what was given
        message = f"{message[:MAX_MESSAGE]} …"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_of(error: Exception, request_id: str) -> tuple[int, dict]:
    """HTTP status and body of an error; a defect of ours is logged whole and told in a line."""
    if not isinstance(error, TolhouseError):
        log.error("internal error", exc_info=error, extra={"fields": {"request_id": request_id}})
        error = Internal(
            f"internal error; the gateway's log has the details of request {request_id}"
        )
    return error.http_status, body_of(str(error), error.http_status)


def invalid(errors: Sequence[Mapping[str, Any]], known: Iterable[str]) -> dict:
    """The answer to a body in which pydantic found `errors`: what was wrong, and what is allowed."""
    found = max(
        errors, key=lambda error: len(error["loc"])
    )  # in a list of alternatives, the one that fitted best
    loc = [str(part) for part in found["loc"][1:2]]
    place = loc[0] if loc and not loc[0].isdigit() else None
    return body_of(_explain(found, place, known), 400, place)


def _explain(found: Mapping[str, Any], place: str | None, known: Iterable[str]) -> str:
    if found["type"] == "json_invalid":
        return f"the body is not valid JSON: {found.get('ctx', {}).get('error', found['msg'])}"
    if found["type"] == "extra_forbidden" and place and len(found["loc"]) == 2:
        return f"unknown parameter {place!r}; known are {', '.join(known)}"
    if found["type"] == "missing" and place and len(found["loc"]) == 2:
        return f"parameter {place!r} is required"
    if place in _FORMS:
        return f"{place} must be {_FORMS[place]}"
    if not place and found["type"] != "value_error":
        return "the body must be a JSON object, sent with Content-Type: application/json"
    inside = ".".join(str(part) for part in found["loc"][1:])
    return f"{inside}: {found['msg']}" if place else found["msg"].removeprefix("Value error, ")
