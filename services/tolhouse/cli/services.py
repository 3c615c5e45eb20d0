"""Processes that serve, alone and all at once."""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from tolhouse import config
from tolhouse.cli.options import checkpoint_argument, checkpoint_option, options, stores_of


def run(main: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(main)
    except KeyboardInterrupt:
        sys.exit(130)


@click.command()
@options(config.LookupConfig)
def lookup(settings: config.LookupConfig) -> None:
    """Serve the tables of a store over gRPC: token ids in, rows out."""
    from tolhouse.lookup import service

    stores_of(settings)
    run(service.run(settings))


@click.command()
@checkpoint_argument("worker")
@options(config.WorkerConfig)
def worker(settings: config.WorkerConfig, checkpoint: Path) -> None:
    """Serve tokens of CHECKPOINT over gRPC: attention here, feed-forward rows from --rows."""
    from tolhouse.worker import run as service

    run(service.run(checkpoint, settings))


@click.command("compile")
@checkpoint_argument("compile")
@options(config.CompileConfig)
@click.option("--background", is_flag=True, hidden=True, help="End when stdin is closed.")
def compile_(settings: config.CompileConfig, checkpoint: Path, background: bool) -> None:
    """Compile decoding of CHECKPOINT for this CPU, as a worker does while it starts."""
    import torch

    from tolhouse.engine.cpu.compiled import compile_decode, end_with_parent
    from tolhouse.model.checkpoint import open_checkpoint

    if background:
        end_with_parent()
    dtype = getattr(torch, settings.dtype.replace("auto", "float32"))
    click.echo(compile_decode(open_checkpoint(checkpoint).config, dtype, settings.compile_cache))


@click.command()
@checkpoint_argument("gateway")
@options(config.GatewayConfig)
def gateway(settings: config.GatewayConfig, checkpoint: Path) -> None:
    """Serve text over HTTP, as OpenAI's API does, with the tokenizer of CHECKPOINT."""
    from tolhouse.gateway import app

    run(app.run(checkpoint, settings))


@click.command()
@checkpoint_option
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
def demo(checkpoint: Path, max_tokens: int) -> None:
    """Build a table, serve it, complete three prompts over HTTP, and stop everything.

    The last line of stdout is one JSON object.
    """
    from tolhouse import demo

    sys.exit(demo.demo(checkpoint, max_tokens))


@click.command()
@checkpoint_option
@click.option("--listen", default="127.0.0.1:8000", show_default=True, help="Gateway's address.")
def serve(checkpoint: Path, listen: str) -> None:
    """Build the table if need be, start lookup, worker and gateway, and run until Ctrl-C."""
    from tolhouse import demo

    demo.serve(checkpoint, listen)
