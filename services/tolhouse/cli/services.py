"""Processes that serve, alone and all at once."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from tolhouse import config
from tolhouse.cli.options import checkpoint_argument, options, stores_of


def run(main: Any) -> None:
    try:
        asyncio.run(main)
    except KeyboardInterrupt:
        sys.exit(130)


@click.command()
@options(config.LookupConfig)
def lookup(settings: config.LookupConfig) -> None:
    """Serve the tables of a store over gRPC: token ids in, rows out."""
    from tolhouse.lookup.service import run as serve

    stores_of(settings)
    run(serve(settings))


@click.command()
@checkpoint_argument("worker")
@options(config.WorkerConfig)
def worker(settings: config.WorkerConfig, checkpoint: Path) -> None:
    """Serve tokens of CHECKPOINT over gRPC: attention here, feed-forward rows from the lookup service."""
    from tolhouse.worker.run import run as serve

    run(serve(checkpoint, settings))


@click.command()
@checkpoint_argument("gateway")
@options(config.GatewayConfig)
def gateway(settings: config.GatewayConfig, checkpoint: Path) -> None:
    """Serve text over HTTP, as OpenAI's API does; CHECKPOINT gives the tokenizer, weights are not read."""
    from tolhouse.gateway.app import run as serve

    run(serve(checkpoint, settings))


@click.command()
@click.option(
    "--checkpoint",
    default="models/demo-memory",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Checkpoint to serve.",
)
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
def demo(checkpoint: Path, max_tokens: int) -> None:
    """Build a table, start lookup, worker and gateway, complete three prompts over HTTP, and stop everything.

    The last line of stdout is one JSON object.
    """
    from tolhouse.demo import demo as run_demo

    sys.exit(run_demo(checkpoint, max_tokens))


@click.command()
@click.option(
    "--checkpoint",
    default="models/demo-memory",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Checkpoint to serve.",
)
@click.option(
    "--listen", default="127.0.0.1:8000", show_default=True, help="Address of the gateway."
)
def serve(checkpoint: Path, listen: str) -> None:
    """Build the table if need be, start lookup, worker and gateway, and leave them running until Ctrl-C."""
    from tolhouse.demo import serve as run_serve

    run_serve(checkpoint, listen)
