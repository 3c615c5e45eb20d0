"""Commands that start services, one or all of them, and commands for their credentials."""

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
    """Serve the model of CHECKPOINT over gRPC; feed-forward rows come from --rows."""
    from tolhouse.worker import run

    asyncio.run(run.run(checkpoint, settings))


@click.command("compile")
@checkpoint_argument("WORKER")
@options(config.CompileConfig)
@click.option("--background", is_flag=True, hidden=True, help="Exit when stdin is closed.")
def compile_(settings: config.CompileConfig, checkpoint: Path, background: bool) -> None:
    """Compile the decode step of CHECKPOINT for this CPU, as a worker does at start."""
    import torch

    from tolhouse.engine.cpu.compiled import compile_decode, end_with_parent
    from tolhouse.model.checkpoint import open_checkpoint, torch_dtype

    if background:
        end_with_parent()
    dtype = torch_dtype(settings.dtype, torch.device("cpu"))
    click.echo(compile_decode(open_checkpoint(checkpoint), dtype, settings.compile_cache))


@click.command()
@checkpoint_argument("GATEWAY")
@options(config.GatewayConfig)
def gateway(settings: config.GatewayConfig, checkpoint: Path) -> None:
    """Serve OpenAI's HTTP API with the tokenizer of CHECKPOINT."""
    from tolhouse.gateway import app

    asyncio.run(app.run(checkpoint, settings))


keys_file = click.argument("file", type=Path)
demo_model = click.option(
    "--checkpoint", default="models/demo-memory", type=Path, help="Folder of the model."
)


@click.command()
@demo_model
@click.option("--max-tokens", default=64, type=click.IntRange(1))
def demo(checkpoint: Path, max_tokens: int) -> None:
    """Build a table, serve it, complete three prompts over HTTP, and stop.

    The last line of stdout is a JSON object with the results.
    """
    from tolhouse import demo

    sys.exit(demo.demo(checkpoint, max_tokens))


@click.command()
@demo_model
@click.option("--listen", default="127.0.0.1:8000", help="Address of the gateway.")
def serve(checkpoint: Path, listen: str) -> None:
    """Build the table if necessary, start all services, and run until Ctrl-C."""
    from tolhouse import demo

    demo.serve(checkpoint, listen)


@click.group(cls=Commands)
def keys() -> None:
    """Create, list and remove API keys. FILE stores their hashes; gateways reload it."""


@keys.command("add")
@keys_file
@click.argument("name")
@click.option(
    "--requests-per-minute", default=600.0, help="Rate limit. Bursts may be a sixth of it."
)
@click.option("--concurrent", default=16, help="Maximum number of concurrent requests.")
def add_key(file: Path, name: str, requests_per_minute: float, concurrent: int) -> None:
    """Create a key for NAME and print it. FILE stores only its hash."""
    from tolhouse.gateway import auth

    click.echo(auth.add_key(file, name, requests_per_minute, concurrent))


@keys.command("list")
@keys_file
def list_keys(file: Path) -> None:
    """List the names and limits of all keys."""
    from tolhouse.gateway import auth

    for name, key in sorted(auth.read_keys(str(file)).items()):
        rate = f"{key.requests_per_minute:g} requests per minute"
        click.echo(f"{name}  {rate}, {key.concurrent} concurrent")


@keys.command("remove")
@keys_file
@click.argument("name")
def remove_key(file: Path, name: str) -> None:
    """Remove the key of NAME. Requests in flight are completed."""
    from tolhouse.gateway import auth

    auth.remove_key(file, name)


@click.command()
@click.argument("folder", type=Path)
@click.option("--name", default="service", help="Name of the files NAME.pem and NAME.key.")
@click.option(
    "--hosts",
    default="localhost,127.0.0.1,::1",
    help="Host names and addresses of the certificate.",
)
def certs(folder: Path, name: str, hosts: str) -> None:
    """Create a development certificate in FOLDER, signed by the authority there.

    The authority is ca.pem, which is created if missing. NAME.pem and NAME.key are valid for 90
    days, for servers and clients. In production, use certificates of your own authority.
    """
    from tolhouse.certs import ensure_authority, issue

    ensure_authority(folder)
    names = [host.strip() for host in hosts.split(",") if host.strip()]
    click.echo(" ".join(map(str, issue(folder, name, names))))
