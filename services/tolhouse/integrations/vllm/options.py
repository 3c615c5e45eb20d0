"""The options of the plug-in, in `--additional-config '{"tolhouse": {…}}'`."""

import difflib
import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tolhouse.config import VLLMConfig, load
from tolhouse.errors import InvalidArgumentError

KEY = "tolhouse"
_TYPES: dict[Any, tuple[Any, str]] = {
    str: (str, "a string"),
    bool: (bool, "true or false"),
    float: ((int, float), "a number"),
}


@dataclass(frozen=True)
class AdditionalConfig:
    """The value of `additional_config` after `start.py` has found the table.

    vLLM pickles it for its processes. The hash has only what compiled code depends on, so that code
    is compiled once for all versions and addresses.
    """

    options: VLLMConfig
    table: str  # "name@version", or "" for a model without rows
    blocks: tuple[str, ...]  # of the table
    others: dict[str, Any]

    def compute_hash(self) -> str:
        factors = json.dumps([self.blocks, self.others], sort_keys=True)
        return sha256(factors.encode()).hexdigest()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of others, as from the dict that vLLM's own models expect."""
        return self.others.get(key, default)


def is_configured(additional: dict[str, Any]) -> bool:
    """Whether `additional`, or a variable for rows or a table, asks for rows."""
    return KEY in additional or bool({"rows", "table"} & parse({}).model_fields_set)


def parse(additional: dict[str, Any]) -> VLLMConfig:
    """Return the options in `additional`, with those of environment variables.

    Raises InvalidArgumentError if an option is unknown or has a value that is not allowed.
    """
    given, fields = additional.get(KEY, {}), VLLMConfig.model_fields
    if not isinstance(given, dict):
        message = f'--additional-config {{"{KEY}": …}} must be a JSON object'
        raise InvalidArgumentError(f"{message}, not {given!r:.60}")
    for name, value in given.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(fields)}"
            raise InvalidArgumentError(f"{VLLMConfig.shown(name)} is unknown; {hint}")
        types, allowed = _TYPES.get(fields[name].annotation, _TYPES[str])
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            message = f"{VLLMConfig.shown(name)} must be {allowed}"
            raise InvalidArgumentError(f"{message}, not {value!r:.60}")
    return load(VLLMConfig, given)
