"""Turns errors of pydantic into InvalidArgumentError."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from pydantic import ValidationError

from tolhouse.errors import InvalidArgumentError, TolhouseError

C = TypeVar("C", bound=type)


def validated(what: str) -> Callable[[C], C]:
    """Decorate a pydantic dataclass to raise InvalidArgumentError for a bad field.

    The message begins with `what`. A validator of the class cannot do this, because pydantic wraps
    every ValueError that a validator raises, and InvalidArgumentError is one.
    """

    def decorate(cls: C) -> C:
        construct = cls.__init__  # type: ignore[misc]  # from pydantic

        @wraps(construct)
        def init(self: Any, *arguments: Any, **fields: Any) -> None:
            try:
                construct(self, *arguments, **fields)
            except ValidationError as error:
                raise _explained(error, what) from None

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return decorate


def _explained(error: ValidationError, what: str) -> TolhouseError:
    first = error.errors(include_url=False)[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, TolhouseError):
        return own
    value = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
    field = ".".join(map(str, first["loc"]))
    return InvalidArgumentError(f"{what}: {field}: {first['msg']}{value}")
