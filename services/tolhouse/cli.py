"""`tolhouse …`: every process and every tool. Reads configuration once and hands on plain values.

A command imports what it needs when it runs: `tolhouse lookup` works where torch is not installed.
"""

import asyncio
import json
import math
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import replace
from logging import WARNING
from pathlib import Path
from typing import Any

import click

from tolhouse import __version__, config
from tolhouse.errors import InvalidArgument, TolhouseError
from tolhouse.model.config import KINDS
from tolhouse.telemetry import event, start_logging

EXTRAS = {
    "torch": "worker", "ray": "build", "redis": "lookup", "fastapi": "gateway", "uvicorn": "gateway", "matplotlib": "train",
    "tokenizers": "worker", "safetensors": "lookup", "prometheus_client": "lookup", "tqdm": "build", "cryptography": "certs", "starlette": "gateway",
}  # fmt: skip


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
            sys.exit(_told(f"this command needs the package {package}: pip install 'tolhouse[{EXTRAS[package]}]'"))
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
        raise InvalidArgument(f"{option} {text!r} is not a list of layer numbers with commas between, such as 3,4")
    return [int(part) for part in parts]


def options(kind: type[config.Config]) -> Callable:
    """A command's options from the fields of a config, and the config itself as its first argument."""

    def decorate(command: Callable) -> Callable:
        def wrapped(**given: Any) -> Any:
            mine = {field: given.pop(field) for field in kind.model_fields}
            loaded = config.load(kind, {field: value for field, value in mine.items() if value is not None})
            start_logging(loaded.log_level)
            return command(loaded, **given)

        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for field, info in reversed(kind.model_fields.items()):
            if info.annotation is bool:
                flag = field.replace("_", "-")
                text = f"{info.description} [{config.variable(kind, field)}]"
                click.option(f"--{flag}/--no-{flag}", field, default=None, help=text)(wrapped)
                continue
            choices = typing.get_args(info.annotation)
            default = "" if info.default in ("", None) else f" Default {info.default}."
            text = f"{info.description}{default} [{config.variable(kind, field)}]"
            shown = None if choices else "N" if info.annotation in (int, float) else "TEXT"
            name = f"--{field.replace('_', '-')}"
            click.option(name, field, type=click.Choice(choices) if choices else str, metavar=shown, help=text)(wrapped)
        return wrapped

    return decorate


def checkpoint_argument(command: str) -> Callable:
    variable = config.CHECKPOINT_VARIABLES[command]
    return click.argument("checkpoint", envvar=variable, type=click.Path(path_type=Path))


def run(main: Any) -> None:
    try:
        asyncio.run(main)
    except KeyboardInterrupt:
        sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tolhouse")
def main() -> None:
    """Serve language models whose feed-forward layers are looked up, not computed.

    \b
    A model's way, command by command:
      tolhouse train demo --out models/mine                 train a checkpoint from scratch
      tolhouse build models/mine                            compute its table of rows, with Ray
      tolhouse publish mine@VERSION                         let the name stand for that version
      tolhouse lookup                                       serve tables over gRPC
      tolhouse worker models/mine                           serve tokens: attention, with rows from the lookup service
      tolhouse gateway models/mine                          serve text: OpenAI's HTTP API
      tolhouse demo                                         all of it at once, on the demo checkpoint

    Every option can be given in the environment too, as the variable named in brackets; the command line wins.
    """


@main.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint; a run that was killed goes on there. Default: runs/RECIPE-KIND.",
)
@click.option("--kind", type=click.Choice(KINDS), default="memory", show_default=True, help="What the FFNs read.")
@click.option("--beta", type=click.IntRange(0, 3), default=0, help="flex: FFN-C keeps beta * h^2 parameters in the block, 1 to 3.")
@click.option("--ffn-c", type=click.Choice(["linear", "swiglu"]), default="linear", show_default=True, help="flex: the form of FFN-C.")
@click.option(
    "--corpus", type=click.Path(path_type=Path), help="A text file, or a folder of them. Default: the Python standard library's sources."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Same seed, same checkpoint.")
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads for tensor work; the result depends on them."
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, in place of the recipe's.")
@click.option("--compile/--no-compile", default=True, show_default=True, help="Use torch.compile where a C compiler is there.")
def train(
    recipe: str,
    out: Path | None,
    kind: str,
    beta: int,
    ffn_c: str,
    corpus: Path | None,
    seed: int,
    threads: int,
    steps: int | None,
    compile: bool,
) -> None:
    """Train a checkpoint from scratch by RECIPE, as the paper does.

    \b
    RECIPE is one of
      tiny                            a minute on two cores
      small small-active              ten minutes on a core: kinds at equal total parameters; base at memory's active ones
      demo                            the committed demo models: about an hour
      paper-250m paper-750m paper-1b  the paper's runs, for accelerators

    The folder gets the checkpoint, its tokenizer, loss.csv, loss.png and a model card. The tokenizer is trained on the
    corpus unless the folder has one already.
    """
    from tolhouse.train.run import train_checkpoint

    train_checkpoint(
        recipe,
        out or Path("runs") / f"{recipe}-{kind}",
        kind=kind,
        beta=beta,
        ffn_c=ffn_c,
        corpus_path=corpus,
        seed=seed,
        threads=threads,
        steps=steps,
        compile=compile,
    )


@main.command()
@checkpoint_argument("build")
@click.option("--publish", "publish_it", is_flag=True, help="Publish the table once it is whole and verified.")
@options(config.BuildConfig)
def build(settings: config.BuildConfig, checkpoint: Path, publish_it: bool) -> None:
    """Compute the table of CHECKPOINT with Ray: every token's feed-forward outputs, in shards.

    Start a build that was killed again with the same options: whole shards are kept. With two stores, the table is
    computed once and written to both.
    """
    from tolhouse.build.frequency import frequent_tokens
    from tolhouse.build.job import build as build_table
    from tolhouse.build.job import plan
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.store import open_store, publish

    opened = open_checkpoint(checkpoint)
    stores = _stores(settings)
    absent = layer_numbers(settings.absent_layers, "--absent-layers")
    manifest = plan(opened, settings.name, settings.codec, settings.shards, embedding=settings.embedding, absent=absent)
    manifest = replace(manifest, frequent=frequent_tokens(opened.tokenizer(), settings.corpus, manifest.vocab_size))
    click.echo(
        f"{manifest.ref}: {manifest.vocab_size} rows of {manifest.record_bytes} bytes, {manifest.table_bytes / 1e6:.1f} MB", err=True
    )
    built = build_table(
        opened, manifest, stores, settings.ray_address, settings.workers, settings.verify_rows, settings.store_timeout_seconds
    )
    if publish_it:
        for url in stores:
            publish(open_store(url), built.ref)
    else:
        click.echo(
            f"built and verified; to make it what {built.name!r} stands for:\n  tolhouse publish {built.ref} --store {settings.store}",
            err=True,
        )
    click.echo(built.ref)


@main.command()
@checkpoint_argument("compress")
@click.option("--publish", "publish_it", is_flag=True, help="Publish the table once it is stored.")
@options(config.CompressConfig)
def compress(settings: config.CompressConfig, checkpoint: Path, publish_it: bool) -> None:
    """Make a table of CHECKPOINT in fewer bytes than `build` does; lookup, workers and clients serve it like any other.

    Frequent tokens are kept in a finer codec, and with --rank-share or --size-ratio rows become a few coefficients of a basis for each layer, which
    workers hold. `tolhouse eval` says what it costs.

    \b
      --codec int4                          under a third of 16 bit, for about a tenth of a percent of perplexity
      --codec bf16 --rank-share 0.5 --head 0    low rank alone
      --codec int4 --size-ratio 8               an eighth of 16 bit
    """
    from tolhouse.analysis.probes import model_rows
    from tolhouse.build.compress import HEAD_SHARE, Scheme, bytes_at_16_bit
    from tolhouse.build.compress import compress as compress_rows
    from tolhouse.build.frequency import count_tokens
    from tolhouse.build.job import plan
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.store import open_store, publish

    opened, stores = open_checkpoint(checkpoint), _stores(settings)
    absent = layer_numbers(settings.absent_layers, "--absent-layers")
    plain = plan(opened, settings.name, settings.codec, settings.shards, embedding=settings.embedding, absent=absent)
    head = settings.head if settings.head >= 0 else plain.vocab_size // HEAD_SHARE
    scheme = Scheme(settings.codec, settings.rank_share, settings.size_ratio, head, settings.head_codec)
    counts = count_tokens(opened.tokenizer(), settings.corpus, plain.vocab_size)
    rows = model_rows(opened, plain.x0, plain.layers)
    made = compress_rows(plain, rows, counts, scheme)
    share = bytes_at_16_bit(plain) / made.bytes
    ranks = f", ranks {' '.join(map(str, made.companions.manifest.ranks))}" if made.companions.manifest.ranks else ""
    click.echo(f"{made.companions.manifest.ref}: {made.bytes / 1e6:.2f} MB, 1/{share:.2f} of 16 bit{ranks}", err=True)
    for url in stores:
        store = open_store(url, settings.store_timeout_seconds)
        stored = made.store(store)
        if publish_it:
            publish(store, stored.ref)
        store.close()
    click.echo(stored.ref)


@main.group(cls=Commands)
def tables() -> None:
    """List, show, publish, roll back and delete versions of tables."""


def _each_store(settings: config.StoreConfig, work: Callable[[Any], Any]) -> None:
    from tolhouse.store import open_store

    for url in _stores(settings):
        store = open_store(url, settings.store_timeout_seconds)
        try:
            work(store)
        finally:
            store.close()


def _stores(settings: config.StoreConfig | config.TableConfig | config.LookupConfig) -> tuple[str, ...]:
    from tolhouse.store import has_password, require_private

    found = tuple(dict.fromkeys(u.strip() for u in re.split(r",(?=\s*\w+://)", settings.store) if u.strip()))
    for url in found:
        require_private(url, insecure=settings.insecure)
        if has_password(url) and any(url in argument for argument in sys.argv):
            event("a password on the command line can be read by everyone on this machine: name a password_file in the URL", WARNING)
    if not found:
        raise InvalidArgument("no store given: file://PATH, redis://HOST:PORT, or both with a comma between")
    # other processes may run elsewhere: a relative path is made absolute
    return tuple(f"file://{Path(u[7:]).absolute()}" if u.startswith("file://") and u[7:] else u for u in found)


@tables.command("list")
@options(config.StoreConfig)
def list_tables(settings: config.StoreConfig) -> None:
    """List every table; a star marks the version that a name stands for."""
    from tolhouse.store import tables as all_tables

    def work(store: Any) -> None:
        found = list(all_tables(store))
        click.echo(f"{store.url}: {len(found) or 'no'} table{'' if len(found) == 1 else 's'}", err=True)
        for m, published in found:
            click.echo(
                f"{'*' if published else ' '} {m.ref}  {m.codec:5} {m.num_records:>8} rows {m.num_layers:>3} layers{' + X0' if m.x0 else '':5} {m.table_bytes / 1e6:>10.1f} MB{f'  over {m.parent}' * bool(m.parent)}"
            )

    _each_store(settings, work)


@tables.command()
@click.argument("table")
@options(config.StoreConfig)
def show(settings: config.StoreConfig, table: str) -> None:
    """Show the manifest of TABLE, NAME or NAME@VERSION, as JSON."""
    from tolhouse.store import resolve

    _each_store(settings, lambda store: click.echo(resolve(store, table).to_json(), nl=False))


@click.command()
@click.argument("table")
@options(config.StoreConfig)
def publish(settings: config.StoreConfig, table: str) -> None:
    """Make a name stand for this version: TABLE is NAME@VERSION."""
    from tolhouse.store import publish as publish_table

    _each_store(settings, lambda store: click.echo(f"{publish_table(store, table).ref} is published in {store.url}"))


tables.add_command(publish)
main.add_command(publish)


@tables.command()
@click.argument("name")
@options(config.StoreConfig)
def rollback(settings: config.StoreConfig, name: str) -> None:
    """Make NAME stand for the version it stood for before."""
    from tolhouse.store import rollback as roll_back

    _each_store(settings, lambda store: click.echo(f"{roll_back(store, name).ref} is published in {store.url}"))


@tables.command()
@click.argument("table")
@click.option("--force", is_flag=True, help="Also a version that is in use: who reads it gets errors.")
@options(config.StoreConfig)
def delete(settings: config.StoreConfig, table: str, force: bool) -> None:
    """Delete a version that is neither published nor in use: TABLE is NAME@VERSION."""
    from tolhouse.store import delete as delete_table

    _each_store(settings, lambda store: click.echo(f"{delete_table(store, table, force).ref} is deleted from {store.url}"))


@main.command()
@click.argument("table")
@click.option("--copy", "copies", multiple=True, metavar="TOKEN=OTHER", help="TOKEN gets the row of OTHER.")
@click.option("--scale", "scales", multiple=True, metavar="TOKEN=FACTOR", help="TOKEN's row is multiplied; 0 takes its memory away.")
@click.option("--rows", "file", type=click.Path(path_type=Path), help="Rows from elsewhere: an .npz with `ids` [T] and `rows` [T, N, D].")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Its tokenizer tells the ids of tokens that are given as text.")
@click.option("--publish", "publish_it", is_flag=True, help="Publish the version at once.")
@options(config.StoreConfig)
def overlay(
    settings: config.StoreConfig,
    table: str,
    copies: tuple[str, ...],
    scales: tuple[str, ...],
    file: Path | None,
    checkpoint: Path | None,
    publish_it: bool,
) -> None:
    """Edit rows of TABLE, NAME or NAME@VERSION: a version that stores the changed rows alone, over the one it changes.

    A TOKEN is an id or, with --checkpoint, a text that is one token. The version is published, rolled back and deleted like any
    other; the one it lies over can't be deleted before it.

    \b
      tolhouse overlay demo-memory --checkpoint models/demo-memory --copy ' import= class' --publish
      tolhouse tables rollback demo-memory
    """
    import numpy as np

    from tolhouse.analysis.edits import factor, halves, read_rows, token_id
    from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer
    from tolhouse.store import publish as publish_table
    from tolhouse.store import resolve, rows_of
    from tolhouse.store.overlay import make_overlay

    if not (copies or scales or file):
        raise InvalidArgument("nothing to change: give --copy, --scale or --rows")
    tokenizer = load_tokenizer(checkpoint / TOKENIZER) if checkpoint else None
    copied = [(token_id(a, tokenizer), token_id(b, tokenizer)) for a, b in (halves(edit, "--copy") for edit in copies)]
    scaled = [(token_id(a, tokenizer), factor(b)) for a, b in (halves(edit, "--scale") for edit in scales)]
    ids, rows = read_rows(file) if file else (np.empty(0, np.int64), None)

    def work(store: Any) -> None:
        manifest = resolve(store, table)
        sources = np.array([*(b for _, b in copied), *(a for a, _ in scaled)], np.int64)
        targets = np.array([*(a for a, _ in copied), *(a for a, _ in scaled)], np.int64)
        manifest.check_ids(np.concatenate([sources, targets]))
        taken = rows_of(store, manifest, sources.astype(np.uint32)) if len(sources) else None
        if taken is not None:
            taken[len(copied) :] *= np.array([by for _, by in scaled], np.float32)[:, None, None]
        parts = [part for part in (taken, rows) if part is not None]
        if len({part.shape[1:] for part in parts}) > 1:
            raise InvalidArgument(f"{file} has rows of {list(parts[1].shape[1:])}; those of {manifest.ref} are {list(parts[0].shape[1:])}")
        made = make_overlay(store, manifest.ref, np.concatenate([targets, ids]), np.concatenate(parts))
        click.echo(f"{made.num_records} changed rows over {made.parent}, {made.table_bytes / 1e3:.1f} kB, in {store.url}", err=True)
        if publish_it:
            publish_table(store, made.ref)
        click.echo(made.ref)

    _each_store(settings, work)


@main.command()
@options(config.LookupConfig)
def lookup(settings: config.LookupConfig) -> None:
    """Serve the tables of a store over gRPC: token ids in, rows out."""
    from tolhouse.lookup.processes import run_all

    _stores(settings)
    run_all(settings)


@main.command()
@checkpoint_argument("worker")
@options(config.WorkerConfig)
def worker(settings: config.WorkerConfig, checkpoint: Path) -> None:
    """Serve tokens of CHECKPOINT over gRPC: attention here, feed-forward rows from the lookup service."""
    from tolhouse.worker.service import run as serve

    run(serve(checkpoint, settings))


@main.command()
@checkpoint_argument("gateway")
@options(config.GatewayConfig)
def gateway(settings: config.GatewayConfig, checkpoint: Path) -> None:
    """Serve text over HTTP, as OpenAI's API does; CHECKPOINT gives the tokenizer, weights are not read."""
    from tolhouse.gateway.app import run as serve

    run(serve(checkpoint, settings))


@main.group(cls=Commands)
def keys() -> None:
    """Make, list and remove API keys of the gateway; FILE keeps their hashes, and a running gateway reads it again."""


keys_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@keys.command("add")
@keys_file
@click.argument("name")
@click.option(
    "--requests-per-minute",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Rate; a sixth may come at once.",
)
@click.option("--concurrent", default=16, show_default=True, type=click.IntRange(1), help="Requests in flight.")
def add_key(file: Path, name: str, requests_per_minute: float, concurrent: int) -> None:
    """Make a key for NAME and print it: this once, only its hash is kept."""
    from tolhouse.gateway.keys import add_key

    click.echo(add_key(file, name, requests_per_minute, concurrent))


@keys.command("list")
@keys_file
def list_keys(file: Path) -> None:
    """List names and limits."""
    from tolhouse.gateway.keys import read_keys

    for name, key in sorted(read_keys(str(file)).items()):
        click.echo(f"{name}  {key.requests_per_minute:g} requests a minute, {key.concurrent} at once")


@keys.command("remove")
@keys_file
@click.argument("name")
def remove_key(file: Path, name: str) -> None:
    """Take the key of NAME away; requests in flight end as they are."""
    from tolhouse.gateway.keys import remove_key

    remove_key(file, name)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="service", show_default=True, help="Of the files NAME.pem and NAME.key.")
@click.option("--hosts", default="localhost,127.0.0.1,::1", show_default=True, help="Names and addresses it is for, with commas between.")
def certs(folder: Path, name: str, hosts: str) -> None:
    """Make a certificate for development in FOLDER, and an authority that signs it if there is none yet.

    ca.pem is the authority, NAME.pem and NAME.key serve for both ends of a connection, for 90 days. In production,
    certificates come from an authority of your own.
    """
    from tolhouse.certs import ensure_authority, issue

    ensure_authority(folder)
    click.echo(" ".join(map(str, issue(folder, name, [host.strip() for host in hosts.split(",") if host.strip()]))))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--worker", help="Worker to ask, HOST:PORT. Default: run the model here, with its FFNs in place, greedily.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="With --worker; 0 is greedy.")
@click.option("--seed", type=click.IntRange(0), help="With --worker.")
@options(config.ClientConfig)
def generate(
    settings: config.ClientConfig, checkpoint: Path, prompt: str, worker: str | None, max_tokens: int, temperature: float, seed: int | None
) -> None:
    """Complete PROMPT and print the text as it comes. CHECKPOINT gives the tokenizer, and without --worker the model."""
    from tokenizers.decoders import DecodeStream

    from tolhouse.client.client import Client
    from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer

    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    ids = tokenizer.encode(prompt).ids
    if worker:
        tokens = Client(worker, access=settings.access()).generate(ids, max_tokens, temperature=temperature, seed=seed)
    elif temperature or seed is not None:
        raise InvalidArgument("--temperature and --seed need a --worker: without one, completion is greedy")
    else:
        from tolhouse.model.checkpoint import open_checkpoint
        from tolhouse.model.generate import greedy

        tokens = greedy(open_checkpoint(checkpoint).model(), ids, max_tokens)
    click.echo(prompt, nl=False)
    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        click.echo(stream.step(tokenizer, token) or "", nl=False)
    click.echo()


@main.command()
@click.argument("table")
@click.argument("ids", nargs=-1, required=True, type=int)
@click.option("--lookup", default="127.0.0.1:50051", show_default=True, help="Lookup replicas, HOST:PORT with commas between.")
@click.option("--out", type=click.Path(path_type=Path), help="Also save the rows [T, N, D] as this .npy file.")
@options(config.ClientConfig)
def fetch(settings: config.ClientConfig, table: str, ids: tuple[int, ...], lookup: str, out: Path | None) -> None:
    """Fetch the rows of token IDS of TABLE, NAME or NAME@VERSION, and show each row's norm by layer, that of X0 first where the table carries it."""
    import numpy as np

    from tolhouse.client.client import Client

    with Client(lookup, access=settings.access()) as client:
        manifest = client.describe(table)
        rows = client.fetch(manifest, list(ids)).astype(np.float32)
    blocks = f"{'X0 and ' * manifest.x0}{manifest.num_layers} layers of {manifest.hidden_size}"
    click.echo(f"{manifest.ref}: {len(ids)} rows, {blocks}, {manifest.codec}", err=True)
    for i, row in zip(ids, rows, strict=True):
        click.echo(f"{i:>8}  " + " ".join(f"{norm:8.3f}" for norm in np.linalg.norm(row, axis=-1)))
    if out:
        np.save(out, rows)


@main.command("eval")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text to predict: a file, or a folder of them. Default: the standard library's held-out part.",
)
@click.option("--table", help="Rows of this table, NAME or NAME@VERSION. Default: those that the model computes.")
@click.option("--through", "codec", type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]), help="Rows as this codec gives them back.")
@click.option("--alpha", default=1.0, show_default=True, type=float, help="Rows are multiplied by this.")
@click.option("--without", default="", metavar="LAYERS", help="Layers whose rows are left out, with commas between.")
@click.option("--most-tokens", default=0, type=click.IntRange(0), help="Only the text's first tokens; 0: all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options(config.StoreConfig)
def evaluate(
    settings: config.StoreConfig,
    checkpoint: Path,
    text: Path | None,
    table: str | None,
    codec: str | None,
    alpha: float,
    without: str,
    most_tokens: int,
    as_json: bool,
) -> None:
    """Tell how well CHECKPOINT predicts text: loss, perplexity, and the loss by how frequent tokens are.

    \b
      tolhouse eval models/demo-memory --text notes.txt
      tolhouse eval models/demo-memory --table demo-memory --store redis://127.0.0.1:6379
      tolhouse eval models/demo-memory --alpha 0.5 --without 4,5
    """
    from tolhouse.analysis.evaluate import evaluate as evaluate_text
    from tolhouse.analysis.probes import model_rows, probed, read_text, table_rows, through
    from tolhouse.model.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    absent = layer_numbers(without, "--without")
    if not math.isfinite(alpha):
        raise InvalidArgument(f"--alpha {alpha} is not a number to scale rows by")
    rows = None
    if not opened.config.num_rows and (table or codec or absent or alpha != 1):
        raise InvalidArgument(f"checkpoint {opened.name} is of kind {opened.config.kind}: it has no rows to replace or to scale")
    if opened.config.num_rows:
        (url,) = _stores(settings) if table else ("",)
        taken = table_rows(opened, url, table) if table else model_rows(opened)
        rows = probed(through(codec, taken) if codec else taken, alpha, absent)
    found = evaluate_text(opened.model(), read_text(opened, text, most_tokens), rows, quiet=False)
    if as_json:
        told = {"tokens": len(found.losses), "loss": found.loss, "perplexity": found.perplexity, "deciles": found.deciles()}
        click.echo(json.dumps(told))
        return
    click.echo(f"{len(found.losses):,} tokens: {found.loss:.4f} nats each, perplexity {found.perplexity:.4f}")
    click.echo("by how frequent they are in the text, a tenth of it each:\n  tenth   tokens   seen at least    loss")
    for d in found.deciles():
        click.echo(f"  {d['decile']:>5}  {d['distinct_tokens']:>7}  {d['least_count']:>9} times  {d['loss']:6.3f}")


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--keys", default=3, show_default=True, type=click.IntRange(1), help="Strongest keys to show per layer.")
@click.option("--neighbours", default=5, show_default=True, type=click.IntRange(1), help="Nearest tokens to show, by cosine of their rows.")
@click.option(
    "--clusters", default=64, show_default=True, type=click.IntRange(2), help="Without TEXT: clusters of key coefficients per layer."
)
@click.option(
    "--probe-tokens", default=8192, show_default=True, type=click.IntRange(0), help="Without TEXT: held-out tokens for the probes; 0: none."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Also write a report with plots, the whole in one file.")
@click.option(
    "--explorer",
    type=click.Path(path_type=Path),
    help="Only write what the gateway's /explore page shows, memory.npz beside tokenizer.json.",
)
def explain(
    checkpoint: Path,
    text: str | None,
    keys: int,
    neighbours: int,
    clusters: int,
    probe_tokens: int,
    as_json: bool,
    page: Path | None,
    explorer: Path | None,
) -> None:
    """Look into the memory of CHECKPOINT.

    With TEXT: for each of its tokens row norms, strongest keys and who shares them, nearest rows. Without: for each layer clusters of key
    coefficients, outliers and singular values, and what becomes of perplexity when rows are scaled or a layer goes without.
    """
    from tolhouse.analysis.explain import explain_text, table_of
    from tolhouse.model.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    if explorer:
        import numpy as np

        from tolhouse.analysis.explain import explorer as everything

        with explorer.open("wb") as out:
            np.savez_compressed(out, **everything(opened, keys, neighbours))  # type: ignore[arg-type]
        click.echo(f"{explorer} written", err=True)
        return
    tokens = explain_text(opened, text, keys, neighbours) if text is not None else []
    found = None
    if page or text is None:
        from tolhouse.analysis.survey import summary, survey

        found = survey(opened, clusters, probe_tokens)
    if page and found:
        from tolhouse.analysis.report import report

        page.write_text(report(found, tokens))
        click.echo(f"report written to {page}", err=True)
    if as_json:
        click.echo(json.dumps(tokens if text is not None else found, indent=1, ensure_ascii=False))
    elif text is not None:
        click.echo(table_of(tokens))
    elif found:
        click.echo(summary(found))


@main.command()
@click.option("--checkpoint", default="models/demo-memory", show_default=True, type=click.Path(path_type=Path), help="Checkpoint to serve.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
def demo(checkpoint: Path, max_tokens: int) -> None:
    """Build a table, start lookup, worker and gateway, complete three prompts over HTTP, and stop everything.

    The last line of stdout is one JSON object.
    """
    from tolhouse.demo import demo as run_demo

    sys.exit(run_demo(checkpoint, max_tokens))


@main.command()
@click.option("--checkpoint", default="models/demo-memory", show_default=True, type=click.Path(path_type=Path), help="Checkpoint to serve.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, help="Address of the gateway.")
def serve(checkpoint: Path, listen: str) -> None:
    """Build the table if need be, start lookup, worker and gateway, and leave them running until Ctrl-C."""
    from tolhouse.demo import serve as run_serve

    run_serve(checkpoint, listen)


if __name__ == "__main__":
    main()
