"""Logs of every process, on stderr: one JSON object per line, or text on a terminal."""

import ipaddress
import json
import logging
import re
import sys
import time

from tolhouse.errors import InvalidArgumentError

log = logging.getLogger("tolhouse")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields, level = getattr(record, "fields", {}), record.levelname.lower()
        error = self.formatException(record.exc_info) if record.exc_info else ""
        if sys.stderr.isatty():
            at = time.strftime("%H:%M:%S", time.localtime(record.created))
            named = " ".join(f"{key}={_value(value)}" for key, value in fields.items())
            lines = [f"{at} {level:7} {record.getMessage()} {named}".rstrip()]
            # Indented, so that a line of an exception cannot look like a log line.
            lines += [f"    {line}" for line in error.splitlines()]
            return "\n".join(map(printable, lines))
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = {"time": at, "level": level, "message": record.getMessage(), **fields}
        return json.dumps({**line, "exception": error} if error else line)


def printable(text: str) -> str:
    """Escape control characters: line ends, escape sequences and text directions."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _value(value: object) -> str:
    """Format the value of a field, in quotes if it contains spaces or other separators."""
    text = str(value)
    plain = text.isprintable() and not {" ", '"', "="} & {*text}
    return text if plain else json.dumps(text, ensure_ascii=False)


def start_logging(level: str = "info") -> None:
    """Send log messages of at least `level` to stderr: debug, info, warning or error."""
    log.handlers[:] = [logging.StreamHandler()]
    log.handlers[0].setFormatter(_Formatter())
    redirect_log(log.name, level.upper())


def redirect_log(name: str, level: int | str) -> None:
    """Send a library's log messages of at least `level` to stderr, in the same form."""
    logger = logging.getLogger(name)
    logger.handlers[:] = log.handlers
    logger.setLevel(level)
    logger.propagate = False


def event(message: str, level: int = logging.INFO, **fields: object) -> None:
    """Log a message with named fields."""
    log.log(level, message, extra={"fields": fields})


def ready(service: str, address: str, **fields: object) -> None:
    """Print the ready message of a process on stdout, as one line of JSON."""
    about = {"event": "ready", "service": service, "address": address, **fields}
    print(json.dumps(about), flush=True)


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[IPv6]:port" into ("host", port).

    Raises InvalidArgumentError for anything else.
    """
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):([0-9]{1,5})", address)
    ipv6, host, port = match.groups() if match else ("", "", "65536")
    if int(port) > 65535 or (ipv6 and not is_ipv6(ipv6)):
        example = "127.0.0.1:50051; port 0 stands for any free port"
        if is_ipv6(address) or is_ipv6(address.rpartition(":")[0]):
            example = "[::1]:50051: write an IPv6 address in brackets"
        raise InvalidArgumentError(f"address {address!r} is not HOST:PORT, such as {example}")
    return ipv6 or host, int(port)


def join_address(host: str, port: int) -> str:
    """Return "host:port", with an IPv6 address in brackets. The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ipv6(host: str) -> bool:
    """Return whether `host` is an IPv6 address without brackets."""
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Return whether "host:port" is this machine: a loopback address, or the name localhost."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
