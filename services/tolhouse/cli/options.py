"""Code that the commands share: one-line errors, options from configs, and lists of stores."""

import io
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from logging import WARNING
from pathlib import Path
from typing import Any, Literal

import click

from tolhouse import config
from tolhouse.errors import InvalidArgumentError, TolhouseError
from tolhouse.extras import installation_hint
from tolhouse.logs import event, printable, start_logging
from tolhouse.store.base import require_private
from tolhouse.store.journal import Origin

_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&]password=")  # a password in a URL
_REPEAT_SECONDS = 0.05  # until the destructor or the hook has ended
# The extra that installs all packages of a command. Other commands need `store` for Redis, and
# `model` for tokens as text.
COMMAND_EXTRAS = {
    **dict.fromkeys(("build", "compress", "convert"), "build"),
    **dict.fromkeys(("train", "train-gates", "eval", "explain"), "train"),
    **dict.fromkeys(("worker", "compile"), "worker"),
    **dict.fromkeys(("gateway", "keys"), "gateway"),
    **dict.fromkeys(("demo", "serve"), "all"),
    "lookup": "lookup",
    "certs": "certs",
    "generate": "model",
    "import": "gguf",
}


class Commands(click.Group):
    """A group whose commands print an error as one line on stderr, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not in alphabetical order

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # the encoding may lack characters
                stream.reconfigure(errors="backslashreplace")
        sys.unraisablehook = _repeat_interrupt
        try:
            return super().main(*args, **kwargs)
        except ModuleNotFoundError as error:
            words = kwargs.get("args") or (args and args[0]) or sys.argv[1:]
            command = next((word for word in words if word in self.commands), "")
            package = (error.name or "").partition(".")[0]
            message = installation_hint(package, COMMAND_EXTRAS.get(command, ""))
            if not message:
                raise
        except (TolhouseError, OSError) as error:  # such as an unreadable file or a full disk
            message = str(error)
        # the message may quote a service or a file
        click.echo("\n".join(map(printable, f"error: {message}".split("\n"))), err=True)
        sys.exit(1)


def _repeat_interrupt(raised: "sys.UnraisableHookArgs") -> None:
    """Report an exception that Python cannot raise, and repeat a Ctrl-C soon.

    Python drops a KeyboardInterrupt in a destructor or in a hook of fork, and the command would
    continue.
    """
    if issubclass(raised.exc_type, KeyboardInterrupt):
        timer = threading.Timer(_REPEAT_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(raised)


class Text(click.ParamType):
    """Text, in UTF-8 if the encoding of the locale cannot decode it."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:  # such bytes are surrogates
            try:
                return os.fsencode(value).decode("utf-8")
            except UnicodeDecodeError:
                message = f"the text {value[:80]!a} is not UTF-8"
                raise InvalidArgumentError(message) from None
        return value


def options(kind: type[config.Config]) -> Callable:
    """Add an option for each field of a config, and pass the config as the first argument."""
    names = [name for field in kind.model_fields for name in config.names(kind, field)]

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(**given: Any) -> Any:
            own = {n: value for n in names if (value := given.pop(n)) is not None}
            settings = config.load(kind, own)
            start_logging(settings.log_level)
            if any(_PASSWORD.search(str(value)) for value in own.values()):
                hint = "name a password_file in the URL"
                event(f"other users can see a password on the command line: {hint}", WARNING)
            with _options_named():
                return command(settings, **given)

        for field, info in reversed(kind.model_fields.items()):
            shows = info.default is not False and info.default not in ("", None, ())
            default = f" Default {info.default}." if shows else ""
            default = " Required." if info.is_required() else default
            text = f"{info.description}{default} [{config.variable(kind, field)}]"
            for name in config.names(kind, field):
                _option(name, info.annotation, help=text, hidden=name != field)(wrapped)
        return wrapped

    return decorate


@contextmanager
def _options_named() -> Iterator[None]:
    """Replace arguments by options in error messages.

    The library names its arguments in backticks.
    """
    try:
        yield
    except TolhouseError as error:
        params = click.get_current_context().command.params
        flags = {p.name: p.opts[0] for p in params if isinstance(p, click.Option)}
        message = re.sub(r"`(\w+)`", lambda m: flags.get(m[1], m[0]), str(error))
        error.args = (message, *error.args[1:])
        raise


def _option(name: str, annotation: Any, **more: Any) -> Callable:
    """Return an option with a value that pydantic parses.

    click shows the type and checks choices.
    """
    flag, parts = config.flag(name), (annotation, *typing.get_args(annotation))
    choices = next((typing.get_args(p) for p in parts if typing.get_origin(p) is Literal), None)
    if bool in parts:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, **more)
    if choices:
        return click.option(flag, name, type=click.Choice(choices), **more)
    kinds = (("N", {int, float}), ("PATH", {Path}))
    metavar = next((shown for shown, types in kinds if types & {*parts}), "TEXT")
    return click.option(flag, name, type=str, metavar=metavar, **more)


def checkpoint_argument(prefix: str = "", *, urls: bool = False) -> Callable:
    """Return the argument CHECKPOINT. With `prefix`, an environment variable can set it.

    With `urls`, the command gets a string, which `local` turns into a folder.
    """
    variable = f"{config.PREFIX}{prefix}_CHECKPOINT" if prefix else None
    return click.argument("checkpoint", envvar=variable, type=str if urls else _folder)


def _folder(place: str) -> Path:
    if "://" in place:
        rule = "only build, compress, convert and import read URLs: download it first"
        raise InvalidArgumentError(f"checkpoint {place} is not a folder of this machine; {rule}")
    return Path(place)


def local(checkpoint: str) -> Path:
    """Return the folder of a checkpoint, or a copy of a URL that lasts until the command ends."""
    if "://" not in checkpoint:
        return Path(checkpoint)
    from tolhouse.sources.remote import local_checkpoint

    return click.get_current_context().with_resource(local_checkpoint(checkpoint))


def split_urls(urls: str) -> list[str]:
    """Split a list of URLs of stores at its commas."""
    return [url.strip() for url in re.split(r",(?=\s*\w+://)", urls) if url.strip()]


def origin_of(settings: config.ChangeConfig) -> Origin:
    """Return who makes the changes of a command, and why."""
    return Origin(settings.by, settings.note) if settings.by else Origin(note=settings.note)


def stores_of(settings: config.StoreConfig | config.LookupConfig) -> tuple[str, ...]:
    """Return the URLs in --store.

    Raises InvalidArgumentError if there is none, or if a store would be called in plaintext over
    the network.
    """
    urls = split_urls(settings.store)
    if not urls:
        raise InvalidArgumentError(f"no store given: {config.STORES}")
    for url in urls:
        require_private(url, insecure=settings.insecure)
    # Paths become absolute, because Ray's processes have other working directories.
    return tuple(
        f"file://{Path(url[7:]).absolute()}" if url.startswith("file://") and url[7:] else url
        for url in dict.fromkeys(urls)
    )
