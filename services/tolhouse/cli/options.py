"""What commands share: errors in one line, options from configs, the stores they name."""

import re
import sys
import typing
from collections.abc import Callable
from logging import WARNING
from pathlib import Path
from typing import Any, Literal

import click

from tolhouse import config
from tolhouse.errors import InvalidArgument, TolhouseError
from tolhouse.logs import event, start_logging
from tolhouse.sampling import SamplingParams

EXTRAS = {
    "torch": "worker",
    "ray": "build",
    "redis": "lookup",
    "fastapi": "gateway",
    "uvicorn": "gateway",
    "matplotlib": "train",
    "tokenizers": "worker",
    "safetensors": "lookup",
    "prometheus_client": "lookup",
    "tqdm": "build",
    "cryptography": "certs",
    "starlette": "gateway",
    "limits": "gateway",
}


class Commands(click.Group):
    """A group whose commands end in one line on stderr where something is wrong, and in no traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a table's life, not of the alphabet

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except TolhouseError as error:
            sys.exit(_told(str(error)))
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            sys.exit(
                _told(
                    f"this command needs the package {package}: pip install 'tolhouse[{EXTRAS[package]}]'"
                )
            )
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(141)
        except OSError as error:  # a file that can't be read, a disk that is full
            sys.exit(_told(str(error)))


def _told(message: str) -> int:
    click.echo(f"error: {message}", err=True)
    return 1


def layer_numbers(text: str, option: str) -> list[int]:
    """Numbers of layers with commas between."""
    parts = [part.strip() for part in text.split(",") if text]
    if not all(part.isdecimal() for part in parts):
        raise InvalidArgument(
            f"{option} {text!r} is not a list of layer numbers with commas between, such as 3,4"
        )
    return [int(part) for part in parts]


def options(kind: type[config.Config]) -> Callable:
    """A command's options from the fields of a config, and the config itself as its first argument."""

    def decorate(command: Callable) -> Callable:
        def wrapped(**given: Any) -> Any:
            own = {name: given.pop(name) for name in names}
            loaded = config.load(kind, {k: v for k, v in own.items() if v is not None})
            start_logging(loaded.log_level)
            return command(loaded, **given)

        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        names = []
        for field, info in reversed(kind.model_fields.items()):
            default = "" if info.default in ("", None, False) else f" Default {info.default}."
            text = f"{info.description}{default} [{config.variable(kind, field)}]"
            for name in (field, *config.old_names(kind, field)):
                names.append(name)
                _option(name, info.annotation, help=text, hidden=name != field)(wrapped)
        return wrapped

    return decorate


def sampling_options(*names: str) -> Callable:
    """A command's options from the list of sampling parameters; None where one is not given."""

    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            field = SamplingParams.model_fields[name]
            kind = float if field.annotation is float else int
            click.option(f"--{name.replace('_', '-')}", type=kind, help=field.description)(command)
        return command

    return decorate


def _option(name: str, annotation: Any, **more: Any) -> Callable:
    """An option whose value pydantic reads; click knows its choices and what to show."""
    flag = name.replace("_", "-")
    if annotation is bool:
        return click.option(f"--{flag}/--no-{flag}", name, default=None, **more)
    if typing.get_origin(annotation) is Literal:
        return click.option(
            f"--{flag}", name, type=click.Choice(typing.get_args(annotation)), **more
        )
    number = {int, float} & {annotation, *typing.get_args(annotation)}
    return click.option(f"--{flag}", name, type=str, metavar="N" if number else "TEXT", **more)


def checkpoint_argument(command: str) -> Callable:
    variable = config.CHECKPOINT_VARIABLES[command]
    return click.argument("checkpoint", envvar=variable, type=click.Path(path_type=Path))


def stores_of(
    settings: config.StoreConfig | config.TableConfig | config.LookupConfig,
) -> tuple[str, ...]:
    from tolhouse.store.base import has_password, require_private

    found = tuple(
        dict.fromkeys(u.strip() for u in re.split(r",(?=\s*\w+://)", settings.store) if u.strip())
    )
    for url in found:
        require_private(url, insecure=settings.insecure)
        if has_password(url) and any(url in argument for argument in sys.argv):
            event(
                "a password on the command line can be read by everyone on this machine: name a password_file in the URL",
                WARNING,
            )
    if not found:
        raise InvalidArgument(
            "no store given: file://PATH, redis://HOST:PORT, or both with a comma between"
        )
    # other processes may run elsewhere: a relative path is made absolute
    return tuple(
        f"file://{Path(u[7:]).absolute()}" if u.startswith("file://") and u[7:] else u
        for u in found
    )
