"""Processes that serve, alone and all at once; the credentials that they ask for."""

import asyncio
import sys
from pathlib import Path

import click

from tolhouse import config
from tolhouse.cli.options import Commands, checkpoint_argument, options, split_urls, stores_of
from tolhouse.errors import InvalidArgumentError
from tolhouse.store.base import require_private


@click.command()
@options(config.LookupConfig)
def lookup(settings: config.LookupConfig) -> None:
    """Serve the tables of a store over gRPC: token ids in, rows out."""
    from tolhouse.lookup import service

    stores_of(settings)
    for flag, urls in (("--store", settings.store), ("--refill", settings.refill)):
        if len(split_urls(urls)) > 1:
            hint = "start a lookup service for each store"
            raise InvalidArgumentError(
                f"{flag} takes one store, but {urls!r} names several: {hint}"
            )
    if settings.refill:
        require_private(settings.refill, insecure=settings.insecure)
    asyncio.run(service.run(settings))


@click.command()
@checkpoint_argument("WORKER")
@options(config.WorkerConfig)
def worker(settings: config.WorkerConfig, checkpoint: Path) -> None:
    """Serve tokens of CHECKPOINT over gRPC: attention here, feed-forward rows from --rows."""
    from tolhouse.worker import run

    asyncio.run(run.run(checkpoint, settings))


@click.command("compile")
@checkpoint_argument("WORKER")
@options(config.CompileConfig)
@click.option("--background", is_flag=True, hidden=True, help="End when stdin is closed.")
def compile_(settings: config.CompileConfig, checkpoint: Path, background: bool) -> None:
    """Compile decoding of CHECKPOINT for this CPU, as a worker does while it starts."""
    import torch

    from tolhouse.engine.cpu.compiled import compile_decode, end_with_parent
    from tolhouse.model.checkpoint import open_checkpoint, torch_dtype

    if background:
        end_with_parent()
    dtype = torch_dtype(settings.dtype, torch.device("cpu"))
    click.echo(compile_decode(open_checkpoint(checkpoint).config, dtype, settings.compile_cache))


@click.command()
@checkpoint_argument("GATEWAY")
@options(config.GatewayConfig)
def gateway(settings: config.GatewayConfig, checkpoint: Path) -> None:
    """Serve text over HTTP, as OpenAI's API does, with the tokenizer of CHECKPOINT."""
    from tolhouse.gateway import app

    asyncio.run(app.run(checkpoint, settings))


keys_file = click.argument("file", type=Path)
demo_model = click.option("--checkpoint", default="models/demo-memory", type=Path, help="Folder.")


@click.command()
@demo_model
@click.option("--max-tokens", default=64, type=click.IntRange(1))
def demo(checkpoint: Path, max_tokens: int) -> None:
    """Build a table, serve it, complete three prompts over HTTP, and stop everything.

    The last line of stdout is one JSON object.
    """
    from tolhouse import demo

    sys.exit(demo.demo(checkpoint, max_tokens))


@click.command()
@demo_model
@click.option("--listen", default="127.0.0.1:8000", help="Gateway's address.")
def serve(checkpoint: Path, listen: str) -> None:
    """Build the table if need be, start lookup, worker and gateway, and run until Ctrl-C."""
    from tolhouse import demo

    demo.serve(checkpoint, listen)


@click.group(cls=Commands)
def keys() -> None:
    """Make, list and remove API keys; FILE keeps their hashes, and gateways read it again."""


@keys.command("add")
@keys_file
@click.argument("name")
@click.option("--requests-per-minute", default=600.0, help="Rate; a sixth may come at once.")
@click.option("--concurrent", default=16, help="Requests in flight.")
def add_key(file: Path, name: str, requests_per_minute: float, concurrent: int) -> None:
    """Make a key for NAME and print it, once: FILE keeps its hash alone."""
    from tolhouse.gateway import auth

    click.echo(auth.add_key(file, name, requests_per_minute, concurrent))


@keys.command("list")
@keys_file
def list_keys(file: Path) -> None:
    """List names and limits."""
    from tolhouse.gateway import auth

    for name, key in sorted(auth.read_keys(str(file)).items()):
        rate = f"{key.requests_per_minute:g} requests a minute"
        click.echo(f"{name}  {rate}, {key.concurrent} at once")


@keys.command("remove")
@keys_file
@click.argument("name")
def remove_key(file: Path, name: str) -> None:
    """Remove the key of NAME; requests in flight are completed."""
    from tolhouse.gateway import auth

    auth.remove_key(file, name)


@click.command()
@click.argument("folder", type=Path)
@click.option("--name", default="service", help="Of NAME.pem and NAME.key.")
@click.option("--hosts", default="localhost,127.0.0.1,::1", help="Names and addresses it is for.")
def certs(folder: Path, name: str, hosts: str) -> None:
    """Make a certificate for development in FOLDER, signed by the authority there.

    ca.pem is the authority, made if there is none; NAME.pem and NAME.key serve for both ends of a
    connection, for 90 days. In production, certificates come from an authority of your own.
    """
    from tolhouse.certs import ensure_authority, issue

    ensure_authority(folder)
    names = [host.strip() for host in hosts.split(",") if host.strip()]
    click.echo(" ".join(map(str, issue(folder, name, names))))
